"""Language modeling: the loss of a record is the mean cross-entropy over its target tokens; prompts have no targets.

So a record counts once however long it is, and its loss does not depend on the records of its batch.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpopt.data.datasets import DataSpec
from dpopt.data.tokens import IGNORED
from dpopt.tasks.sequence_classification import check_length, check_tokens, check_width


class LanguageModeling:
    """Write the next tokens of a `DataSpec`'s records.

    Args:
        spec: the dataset.

    Attributes:
        at_once: records that are evaluated at once; their logits have a number per token of the vocabulary.
    """

    at_once = 8

    def __init__(self, spec: DataSpec) -> None:
        self.spec = spec

    def loss_fn(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean over records of their mean loss, of logits (n, T, vocabulary) and targets (n, T)."""
        return mean_losses(outputs, targets).mean()

    def model_arguments(self) -> dict[str, Any]:
        """Return what a model may take from the dataset; it gets those that it has arguments for."""
        return {"num_classes": None}

    def example(self, views: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Make one record (views, T) and its targets (T,), on the device of `like`, to measure with."""
        inputs = torch.zeros(views, *self.spec.shape, dtype=torch.long, device=like.device)
        return inputs, torch.zeros(self.spec.shape, dtype=torch.long, device=like.device)

    def metric_sums(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Sum over records the `loss` and the `accuracy`, the share of target tokens that are the likeliest."""
        hits = (outputs.argmax(-1) == targets).sum(1) / (targets != IGNORED).sum(1).clamp(min=1)
        return {"accuracy": float(hits.sum()), "loss": float(mean_losses(outputs.float(), targets).double().sum())}

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Return what follows from mean metrics: the perplexity, exp of the mean loss of a record."""
        return {"perplexity": math.exp(min(means["loss"], 700.0))}

    def check_source(self, model: nn.Module, source: Any) -> None:
        """Check that the model knows every token.

        Raises:
            ValueError: for a tokenizer of another model.
        """
        check_tokens(model, source)

    def check(self, model: nn.Module) -> None:
        """Check that the model returns logits for every position.

        Raises:
            ValueError: naming the shapes.
        """
        length = self.spec.shape[0]
        check_length(model, length)
        inputs = torch.zeros(2, length, dtype=torch.long, device=next(model.parameters()).device)
        with torch.no_grad():
            shape = tuple(model(inputs).shape)
        if len(shape) != 3 or shape[:2] != (2, length):
            raise ValueError(
                f"the model's output has the shape {shape[1:]} where a language model returns logits of {length} "
                "positions: choose a model of conf/model that writes text"
            )
        check_width(model, length)


def mean_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy (n,) of each record over its targets that are not ignored."""
    losses = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    counted = (targets != IGNORED).sum(1).clamp(min=1)
    return losses.unflatten(0, targets.shape).sum(1) / counted
