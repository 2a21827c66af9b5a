"""From accepted orders to pixels: the batcher that decides what runs next, and the one thread that runs it."""
