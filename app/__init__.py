"""The HTTP service draws pictures from weights folders, in batched forward passes. It knows nothing of training."""
