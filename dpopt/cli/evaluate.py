"""Evaluate a finished run's model on the test set of its dataset.

dpopt evaluate runs/digits-cnn-microadam-eps8-seed0-… [DATA_DIR]
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path


def evaluate(words: Sequence[str]) -> int:
    """Print test accuracy and loss of a finished run's model; return the exit code."""
    parser = argparse.ArgumentParser("dpopt evaluate", description="Evaluate a finished run on its test set.")
    parser.add_argument("run", type=Path, help="a run directory with a model.safetensors")
    parser.add_argument("data_dir", nargs="?", help="where the dataset is; by default where the run found it")
    arguments = parser.parse_args(words)
    try:
        values = _measure(arguments.run, arguments.data_dir)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"accuracy {values['accuracy']:.4%}, loss {values['loss']:.6f}")
    return 0


def _measure(run: Path, data_dir: str | None) -> dict[str, float]:
    """Load a run's model and test set, and average the metrics."""
    import dpopt
    from dpopt.runs.directory import read_config
    from dpopt.training import trainer
    from dpopt.training.build import load_test_set, make_task

    model = dpopt.load(run)
    config = read_config(run)
    config = replace(config, data_dir=data_dir or config.data_dir)
    task = make_task(config)
    return trainer.evaluate(model, task, load_test_set(config, task), config.precision)
