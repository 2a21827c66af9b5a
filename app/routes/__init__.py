"""Each route reads its request, hands the work to the engine and answers."""
