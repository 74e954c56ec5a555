"""Predictions of a run's model for new images or rows, prepared exactly as the run's test set was."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpopt import files
from dpopt.data.inputs import class_names
from dpopt.data.records import read_rows
from dpopt.data.sources import TensorSource
from dpopt.runs.directory import PREPROCESSING, RESULT, read_config
from dpopt.training.build import make_task
from dpopt.training.evaluation import outputs_of
from dpopt.training.finished import load

_AT_ONCE = 64
_TABLES = (".csv", ".tsv", ".jsonl")

Raw = tuple[str, Any]  # name; a path of an image, or a row


class Predictor:
    """Names the likeliest class of raw inputs, by the model of a run or of an exported folder.

    Args:
        run: the directory.

    Attributes:
        inputs: makes inputs of raw ones (`dpopt.data.inputs`).
        classes: their names.

    Raises:
        ValueError: for a run without a model, without classes, or whose data do not say how inputs are made.
    """

    def __init__(self, run: Path) -> None:
        self.model, config = load(run), read_config(run)
        spec = make_task(config).spec
        if not spec.classes:
            raise ValueError(f"{run} writes text and names no classes: dpopt.load returns its model")
        if spec.inputs is None:
            raise ValueError(
                f"the DataSpec of {spec.name} does not say how a file becomes an input of the model: give it inputs=, "
                "an object as in dpopt.data.inputs"
            )
        stored = [files.read_json(run / name).get("classes", ()) for name in (PREPROCESSING, RESULT)]
        self.inputs = spec.inputs
        self.classes = class_names(next(filter(None, stored), spec.class_names), spec.classes)
        self._precision, self._trimmed = config.precision, spec.task == "sequence_classification"

    def raw_inputs(self, source: Path) -> Iterator[Raw]:
        """List the images of a folder, one image, or the rows of a table.

        Raises:
            ValueError: for what the run's model cannot read; FileNotFoundError for a missing file.
        """
        if not source.exists():
            raise FileNotFoundError(f"{source} is missing: name a folder of images, an image or a table")
        table = source.suffix.lower() in _TABLES
        if table != (self.inputs.reads == "row"):
            wanted = "rows: name a .csv, .tsv or .jsonl file" if not table else "images: name a folder or an image"
            raise ValueError(f"{source} cannot be predicted, because the run's model reads {wanted}")
        if not table:
            found = (path for path in source.rglob("*") if path.is_file() and not path.name.startswith("."))
            yield from ((str(path), path) for path in (sorted(found) if source.is_dir() else [source]))
            return
        for number, row in enumerate(read_rows(source), start=1):
            if number == 1 and (missing := [name for name in self.inputs.columns if name not in row]):
                raise ValueError(
                    f"{source} has no column {', '.join(map(repr, missing))} but {', '.join(map(str, row))}: rename it"
                )
            yield f"{source}:{number}", row

    def predict(self, raw: Iterable[Raw]) -> Iterator[tuple[str, str, float] | str]:
        """Yield name, class and probability of each input, or a sentence about one that cannot be read; in order."""
        remaining = iter(raw)
        while some := list(islice(remaining, _AT_ONCE)):
            prepared = [self._prepared(name, item) for name, item in some]
            inputs = [found for found in prepared if isinstance(found, Tensor)]
            found = iter(self._likeliest(inputs) if inputs else [])
            for (name, _), one in zip(some, prepared, strict=True):
                yield one if isinstance(one, str) else (name, *next(found))

    def _prepared(self, name: str, raw: Any) -> Tensor | str:
        """Make the input, or say why it cannot be made."""
        try:
            if self.inputs.reads == "row":
                made: Tensor = self.inputs(raw)
                return made
            return self._from_image(raw)
        except ValueError as error:
            return f"{name} {error}"
        except (TypeError, LookupError) as error:  # of a short row, in code of the user
            return f"{name} cannot be read ({type(error).__name__}: {error})"

    def _from_image(self, path: Path) -> Tensor:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(path) as image:
                image.load()
        except UnidentifiedImageError as error:
            raise ValueError("cannot be read as an image (no image format is recognized)") from error
        except Exception as error:  # every format has its own
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"cannot be read as an image ({reason})") from error
        made: Tensor = self.inputs(image)
        return made

    @torch.no_grad()
    def _likeliest(self, inputs: Sequence[Tensor]) -> Iterator[tuple[str, float]]:
        stacked = torch.stack(list(inputs))
        source = TensorSource(stacked, torch.zeros(len(stacked)), trimmed=self._trimmed)
        for rows, _ in source.plain(_AT_ONCE):
            likely = outputs_of(self.model, rows, self._precision).double().softmax(1).max(1)
            for probability, number in zip(likely.values.tolist(), likely.indices.tolist(), strict=True):
                yield self.classes[number], probability
