"""The engine draws accepted orders: queues that form batches, one thread for each device, and the models it serves."""
