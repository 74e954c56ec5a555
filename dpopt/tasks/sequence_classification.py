"""Classification of texts: token ids of one length into classes."""

from typing import Any

import torch
from torch import Tensor, nn

from dpopt.grad_sample.forward_check import check_padding
from dpopt.tasks.classification import Classification


class SequenceClassification(Classification):
    """Classify the texts of a `DataSpec`: cross-entropy, accuracy, one output per class."""

    at_once = 64

    def model_arguments(self) -> dict[str, Any]:
        """Return what a model may take from the dataset; it gets those that it has arguments for."""
        return {"num_classes": self.spec.classes}

    def example(self, views: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Make one text (views, T) of a token and its class (), on the device of `like`, to measure with."""
        inputs = torch.zeros(views, *self.spec.shape, dtype=torch.long, device=like.device)
        return inputs, torch.zeros((), dtype=torch.long, device=like.device)

    def check(self, model: nn.Module) -> None:
        """Check that the model reads texts of this length and has an output per class.

        Raises:
            ValueError: naming lengths or shapes.
        """
        check_length(model, self.spec.shape[0])
        super().check(model)
        check_width(model, self.spec.shape[0])

    def check_source(self, model: nn.Module, source: Any) -> None:
        """Check that the model knows every token.

        Raises:
            ValueError: for a tokenizer of another model.
        """
        check_tokens(model, source)


def check_tokens(model: nn.Module, source: Any) -> None:
    """Check that a model knows the tokens of a source.

    Raises:
        ValueError: naming the largest token and the size of the vocabulary.
    """
    vocabulary, tokens = getattr(model, "vocabulary", None), getattr(source, "inputs", None)
    if vocabulary is None or tokens is None or not len(tokens) or (largest := int(tokens.max())) < vocabulary:
        return
    raise ValueError(
        f"the tokenizer makes the token {largest:,} and the model knows {vocabulary:,}: set dataset.tokenizer to the "
        "model's own"
    )


def check_width(model: nn.Module, length: int) -> None:
    """Check that padding changes no output of a model for texts of this length.

    Raises:
        ValueError: for a model whose outputs depend on the padding behind a text.
    """
    vocabulary, device = getattr(model, "vocabulary", None) or 2, next(model.parameters()).device
    check_padding(model, torch.arange(2 * length, device=device).view(2, -1) % (vocabulary - 1) + 1)


def check_length(model: nn.Module, length: int) -> None:
    """Check that a model reads texts of a length.

    Raises:
        ValueError: naming both.
    """
    longest = getattr(model, "max_length", None)
    if longest is not None and length > longest:
        raise ValueError(
            f"texts have {length:,} tokens and the model reads {longest:,}: set dataset.max_length={longest}"
        )
