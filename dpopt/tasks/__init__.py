"""Tasks: what is learned. A task gives the loss, the metrics, the model's arguments, and checks."""

from dpopt.tasks.classification import Classification

__all__ = ["Classification"]
