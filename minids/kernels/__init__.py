"""Faster bodies of the model's functions, on CPU and GPU, and the registry that picks them."""
