"""Training: components built once from a configuration, and the one class that trains them."""
