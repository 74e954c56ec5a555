"""Texts as token ids of one length, padded by -1, and the targets of records."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dpopt.data.inputs import column_of
from dpopt.data.records import Records
from dpopt.models.transformer import load_tokenizer

PAD, IGNORED = -1, -100  # a token that is none, a target that is none


@dataclass(frozen=True)
class Tokens:
    """How texts become token ids of one length.

    Attributes:
        tokenizer: name on the Hugging Face hub, a folder, a .gguf file or `bytes`, one token per byte.
        max_length: T.
    """

    tokenizer: str | None
    max_length: int

    def load(self) -> Any:
        """Load the tokenizer.

        Raises:
            ValueError: when none is named; FileNotFoundError when it cannot be read or downloaded.
        """
        if self.tokenizer is None:
            raise ValueError(
                "text needs a tokenizer and this model names none: choose a transformer (model=minilm) or set "
                "dataset.tokenizer to a name or a folder"
            )
        return load_tokenizer(self.tokenizer)

    def encode(self, records: Records, classes: Sequence[str] | None) -> tuple[Tensor, Tensor]:
        """Tokenize records; return tokens (N, T) and classes (N,), or next tokens (N, T) of a language model.

        Raises:
            ValueError: naming the first record without text or with a class that there is not.
        """
        if self.max_length < 2:
            raise ValueError(f"dataset.max_length={self.max_length} leaves no room for a text: set at least 2")
        tokenizer = self.load()
        if classes is not None:
            labels = _labels(records, classes)
            for i, text in enumerate(records.texts):
                _check_text(text, i, records.origin, "text")
            return self.padded(tokenizer(records.texts)["input_ids"], PAD), labels
        for i, text in enumerate(records.targets):
            _check_text(text, i, records.origin, "completion")
        end = tokenizer.eos_token_id
        prompts = tokenizer([f"{text}\n" if text else "" for text in records.texts])["input_ids"]
        completions = tokenizer([text.strip() for text in records.targets], add_special_tokens=False)["input_ids"]
        rows, targets = [], []
        for prompt, completion in zip(prompts, completions, strict=True):
            written = (completion + ([] if end is None else [end]))[: self.max_length - 1]
            prompt = (prompt or [written[0] if end is None else end])[len(written) - self.max_length :]
            rows.append(prompt + written)
            targets.append([IGNORED] * (len(prompt) - 1) + written)
        return self.padded(rows, PAD), self.padded(targets, IGNORED)

    def padded(self, rows: Iterable[Sequence[int]], value: int) -> Tensor:
        """Cut rows of token ids to T, and pad them on the right."""
        rows = [row[: self.max_length] for row in rows]
        padded = torch.full((len(rows), self.max_length), value)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = torch.tensor(row)
        return padded


class TextRows:
    """How a row becomes a model's input: its text as token ids, padded to one length.

    Args:
        tokens: how texts become token ids.
        column: of the text.
    """

    reads = "row"

    def __init__(self, tokens: Tokens, column: str) -> None:
        self.tokens, self.columns = tokens, (column,)

    def __call__(self, raw: Mapping[str, Any]) -> Tensor:
        return self.tokens.padded([self._tokenizer(column_of(raw, self.columns[0]))["input_ids"]], PAD)[0]

    @cached_property
    def _tokenizer(self) -> Any:
        return self.tokens.load()

    def to_json(self) -> dict[str, Any]:
        """Describe the steps as plain values."""
        steps = ["tokenize the column", f"keep the first {self.tokens.max_length} tokens"]
        return {"reads": "row", "columns": list(self.columns), "steps": steps, "tokenizer": self.tokens.tokenizer}


def _check_text(text: Any, index: int, origin: str, kind: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"record {index + 1} of {origin} has an empty {kind}: remove it, or fill it in")


def _labels(records: Records, classes: Sequence[str]) -> Tensor:
    number = {str(name): i for i, name in enumerate(classes)}
    for i, name in enumerate(records.targets):
        if name not in number:
            raise ValueError(
                f"record {i + 1} of {records.origin} has the label {name!r}, which is none of the classes "
                f"({', '.join(list(number)[:8])}): correct it, or dataset.classes"
            )
    return torch.tensor([number[name] for name in records.targets])
