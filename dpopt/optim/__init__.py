"""Optimizers that torch lacks. Each is an ordinary `torch.optim.Optimizer` that reads `p.grad` and knows no privacy."""

from dpopt.optim.microadam import MicroAdam

__all__ = ["MicroAdam"]
