"""Predict the class of new images, or of the rows of a table, by a run's model.

dpopt predict runs/NAME photos/              a folder of images, or one image
dpopt predict runs/NAME tickets.csv          rows of a .csv, .tsv or .jsonl with the run's columns
dpopt predict runs/NAME photos -o found.csv

Writes path, class and probability as CSV; a row's path is FILE:ROW. Inputs are prepared exactly as the run's test set.
What cannot be read is named on stderr, a sentence each; the others are predicted, and the exit code is then 1.
"""

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from dpopt.cli import verb_parser


def predict(words: Sequence[str]) -> int:
    """Write predictions as CSV; return the exit code."""
    parser = verb_parser("predict", __doc__)
    parser.add_argument("run", type=Path, help="a run directory with a model.safetensors, or an exported folder")
    parser.add_argument("source", type=Path, help="a folder of images, an image, or a table")
    parser.add_argument("-o", "--output", type=Path, help="the CSV file; by default it goes to stdout")
    arguments = parser.parse_args(words)
    return _write(arguments.run, arguments.source, arguments.output)


def _write(run: Path, source: Path, output: Path | None) -> int:
    from dpopt import files
    from dpopt.training.prediction import Predictor

    predictor = Predictor(run)
    text = io.StringIO()
    to = csv.writer(sys.stdout if output is None else text, lineterminator="\n")
    predicted, refused = 0, 0
    for found in predictor.predict(predictor.raw_inputs(source)):
        if not (predicted or refused):  # what stops all predictions leaves no table
            to.writerow(("path", "class", "probability"))
        if isinstance(found, str):
            refused += 1
            print(found, file=sys.stderr)
        else:
            predicted += 1
            to.writerow((found[0], found[1], f"{found[2]:.6f}"))
    if not predicted and not refused:
        raise ValueError(f"{source} holds nothing to predict")
    if output is not None:
        files.write_atomic(output, text.getvalue())
        print(f"wrote {output}: {predicted} predictions")
    return 1 if refused else 0
