"""Classification of inputs of one shape into classes: cross-entropy, accuracy, one output per class."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpopt.data.datasets import DataSpec
from dpopt.grad_sample.modes import eval_mode


class Classification:
    """Classify inputs of a `DataSpec`. Another task is another class with these methods.

    Args:
        spec: the dataset.

    Attributes:
        at_once: examples that are evaluated at once.
    """

    at_once = 512

    def __init__(self, spec: DataSpec) -> None:
        self.spec = spec

    def loss_fn(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of outputs (n, classes) and targets (n,)."""
        return F.cross_entropy(outputs, targets)

    def model_arguments(self) -> dict[str, Any]:
        """Return what a model may take from the dataset; it gets those that it has arguments for."""
        shape = self.spec.shape  # (channels, height, width), or (features,) of a table: images of one pixel
        size = shape[-1] if len(shape) > 1 else 1
        return {"num_classes": self.spec.classes, "in_channels": shape[0], "image_size": size}

    def example(self, views: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Make one input (views, …) and its target (), in the dtype and on the device of `like`, to measure with."""
        inputs = torch.zeros(views, *self.spec.shape, dtype=like.dtype, device=like.device)
        return inputs, torch.zeros((), dtype=torch.long, device=like.device)

    def metric_sums(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Sum each metric over a batch: `accuracy` counts hits, `loss` adds cross-entropies in float64."""
        return {
            "accuracy": float((outputs.argmax(1) == targets).sum()),
            "loss": float(F.cross_entropy(outputs.double(), targets, reduction="sum")),
        }

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Return what follows from mean metrics: nothing."""
        return {}

    def check_source(self, model: nn.Module, source: Any) -> None:
        """Check examples against the model; their shape has been checked."""

    def check(self, model: nn.Module) -> None:
        """Check that the model reads the dataset's inputs and has an output per class.

        Raises:
            ValueError: naming the shapes.
        """
        spec = self.spec
        inputs, _ = self.example(2, next(model.parameters()))
        try:
            with torch.no_grad(), eval_mode(model):
                shape = tuple(model(inputs).shape)
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ValueError(
                f"the model does not accept {spec.name}'s inputs of shape {spec.shape} ({str(error).splitlines()[0]}): "
                "change the model's arguments or the dataset's image_size"
            ) from error
        if shape != (2, spec.classes):
            raise ValueError(f"the model's output has shape {shape[1:]} where {spec.name} has {spec.classes} classes")
