"""Train a finished run again, from the configuration that it recorded, and compare the results.

dpopt rerun runs/NAME

The second run has the same seed, so the same samples and noise: on the same machine and code it is the first one again,
bit by bit. Elsewhere rounding differs, and training multiplies the difference: then the figures agree when they differ
by no more than three standard errors of an accuracy on the test set, √(2p(1 − p)/n). A run from before a key was added
to the configuration, or of another noise version, draws other noise today: then its figures can agree, its bits cannot.
"""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpopt.cli import verb_parser


def rerun(words: Sequence[str]) -> int:
    """Train a run again and say whether the result agrees; return the exit code."""
    parser = verb_parser("rerun", __doc__)
    parser.add_argument("run", type=Path, help="a run directory with a result.json")
    parser.add_argument("--output", type=Path, help="where to train; by default a folder that is removed afterwards")
    arguments = parser.parse_args(words)
    agrees, text = _compare(arguments.run, arguments.output)
    print(text)
    return 0 if agrees else 1


def _compare(directory: Path, output: Path | None) -> tuple[bool, str]:
    """Train a finished run again and compare it with its result.

    Raises:
        ValueError: for a run that cannot be repeated, or where its repetition is there already.
    """
    from dpopt.config.schema import Config
    from dpopt.runs.directory import finished
    from dpopt.runs.identity import is_secret, locate
    from dpopt.runs.provenance import short_commit
    from dpopt.training.build import make_task
    from dpopt.training.finished import load_test_set
    from dpopt.training.run import run

    before = finished(directory)
    if before is None:
        raise ValueError(f"{directory} holds no finished run: name a directory with a result.json")
    if is_secret(Config.from_stored(before["config"])):
        raise ValueError(
            "a run with secret randomness cannot be repeated, because its key was erased when it ended: train it with "
            "randomness=research to compare results"
        )
    with tempfile.TemporaryDirectory() as folder:
        config = replace(
            Config.from_stored(before["config"]),
            output_dir=str(output or folder),
            logger={"_target_": "dpopt.tracking.CsvOnly"},
            time_limit=None,
            fresh=False,
        )
        if output and finished(locate(config)):
            raise ValueError(f"{output} holds this run, finished: name another folder")
        after = run(config)
        same = _same_weights(directory, locate(config))
    agrees, text = verdict(before, after, same, len(load_test_set(config, make_task(config))))
    commits = sorted({short_commit(result["git_commit"]) for result in (before, after) if result["git_commit"]})
    told = f" (commit{'s' * (len(commits) > 1)} {', '.join(commits)})" if commits else ""  # none outside a checkout
    return agrees, f"{directory}: {text}{told}"


def _same_weights(one: Path, two: Path) -> bool:
    """Compare the exported weights of two runs bit by bit."""
    from safetensors.torch import load_file

    from dpopt.runs.directory import WEIGHTS

    first, second = load_file(one / WEIGHTS), load_file(two / WEIGHTS)
    return all(first[name].equal(tensor) for name, tensor in second.items())


def verdict(before: dict[str, Any], after: dict[str, Any], same_weights: bool, test_size: int) -> tuple[bool, str]:
    """Decide whether two results agree, and say why in a sentence."""
    from dpopt.runs.identity import hash_of

    if not math.isclose(before["epsilon"], after["epsilon"], rel_tol=1e-6):
        return False, f"ε was {before['epsilon']:.6g} and is {after['epsilon']:.6g} now: the accounting has changed"
    one, two = before["test_accuracy"], after["test_accuracy"]
    if same_weights and one == two:
        return True, f"agrees bit by bit: accuracy {one:.2%}, all weights equal"
    error = math.sqrt(2 * max(one * (1 - one), 1 / test_size) / test_size)
    text = f"accuracy was {one:.2%} and is {two:.2%} now"
    bar = f"three standard errors ({100 * error:.2f} points each) of {test_size:,} tests"
    why = (
        ""
        if hash_of(before["run"]) == hash_of(after["run"])
        else " (the draws are others: they are keyed by the configuration)"
    )
    versions = [result.get("noise_version", 1) for result in (before, after)]
    if versions[0] != versions[1]:
        why = f" (the draws are others: noise version {versions[0]} then, {versions[1]} now)"
    if abs(one - two) <= 3 * error:
        return True, f"agrees within {bar}: {text}{why}"
    return False, f"does not agree: {text}, beyond {bar}{why}"
