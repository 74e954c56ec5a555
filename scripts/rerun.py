"""Train a finished run again, from the configuration that it recorded, and say whether the result agrees.

python scripts/rerun.py runs/NAME

The second run has the same seed, so the same samples and noise: on the same machine and code it is the first one again,
bit by bit. Elsewhere rounding differs, and training multiplies the difference: then the figures agree when they differ
by no more than three standard errors of an accuracy on the test set, √(2p(1 − p)/n). A run from before a key was added
to the configuration has another name today, and its noise, which is keyed by the name, is another.
"""

import argparse
import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from dpopt.config.components import build
from dpopt.config.schema import Config
from dpopt.runs import directory as run_files
from dpopt.runs import provenance
from dpopt.runs.identity import locate
from dpopt.training.build import load_data, make_device
from dpopt.training.run import run


def verdict(before: dict[str, Any], after: dict[str, Any], same_weights: bool, test_size: int) -> tuple[bool, str]:
    """Whether two results agree, and a sentence that says why."""
    if not math.isclose(before["epsilon"], after["epsilon"], rel_tol=1e-6):
        return False, f"ε was {before['epsilon']:.6g} and is {after['epsilon']:.6g} now: the accounting has changed"
    one, two = before["test_accuracy"], after["test_accuracy"]
    if same_weights and one == two:
        return True, f"agrees bit by bit: accuracy {100 * one:.2f} %, all weights equal"
    error = math.sqrt(2 * max(one * (1 - one), 1 / test_size) / test_size)
    text = f"accuracy was {100 * one:.2f} % and is {100 * two:.2f} % now"
    bar = f"three standard errors ({100 * error:.2f} points each) of {test_size:,} tests"
    if abs(one - two) <= 3 * error:
        why = "" if before["run"] == after["run"] else " (the noise is another one: it is keyed by the name)"
        return True, f"agrees within {bar}: {text}{why}"
    return False, f"does not agree: {text}, beyond {bar}"


def main() -> int:
    """Train again and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory with a result.json")
    parser.add_argument("--output", type=Path, help="where to train; by default a folder that is removed afterwards")
    arguments = parser.parse_args()
    before = run_files.finished(arguments.run)
    if before is None:
        print(f"{arguments.run} holds no finished run: name a directory with a result.json", file=sys.stderr)
        return 1
    if before["config"]["secure_rng"]:
        print("a run with secure_rng=true cannot be repeated: its key was erased when it ended", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        config = replace(
            Config(**before["config"]),
            output_dir=str(arguments.output or folder),
            logger={"_target_": "dpopt.tracking.CsvOnly"},
            time_limit=None,
            fresh=False,
        )
        if arguments.output and run_files.finished(locate(config)):
            print(f"{arguments.output} holds this run, finished: name another folder", file=sys.stderr)
            return 1
        after = run(config)
        weights = [load_file(path / run_files.WEIGHTS) for path in (arguments.run, locate(config))]
    same = all(weights[0][name].equal(tensor) for name, tensor in weights[1].items())
    spec = build("dataset", config.dataset)()
    test_size = len(load_data(config, spec, make_device("cpu"))[1])
    good, text = verdict(before, after, same, test_size)
    commits = {provenance.short_commit(result["git_commit"]) for result in (before, after)}
    print(f"{arguments.run}: {text} (commit{'s' * (len(commits) > 1)} {', '.join(sorted(commits))})")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
