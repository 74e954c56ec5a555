"""MicroAdam and its kernels: a PyTorch reference, C for a CPU, Triton for a GPU."""

from dpopt.optim.microadam.optimizer import MicroAdam

__all__ = ["MicroAdam"]
