"""Evaluate a finished run's model on the test set of its data set.

python scripts/evaluate.py runs/digits-cnn-microadam-eps8-seed0-… [data_dir]
"""

import sys
from pathlib import Path

import torch
import yaml

import dpopt
from dpopt.config.components import build
from dpopt.config.schema import Config
from dpopt.data.sources import as_source
from dpopt.training.trainer import evaluate


def main(run_dir: str, data_dir: str | None = None) -> None:
    """Print test accuracy and loss of the model in `run_dir`."""
    model = dpopt.load(run_dir)
    config = Config(**yaml.safe_load((Path(run_dir) / "config.yaml").read_text()))
    _, test = build("dataset", config.dataset)().load(Path(data_dir or config.data_dir), torch.device("cpu"), 0)
    values = evaluate(model, as_source(test), config.precision)
    print(f"accuracy {values['accuracy']:.4%}, loss {values['loss']:.6f}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(str(error))
