"""Sweepers that search, such as Optuna's: what they may choose by, what a job returns, what a search spends.

This module imports no torch: Hydra imports it before anything else.
"""

import math
from collections.abc import Sequence
from typing import Any

from dpopt.privacy.accounting import compose_epsilon
from dpopt.runs.result import HOLDOUT

CHOICE = "training only: a choice by the accuracy on a hold-out or test set spends more, which is not counted"
_EVERY = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"  # runs every combination, whatever jobs return


class Score(float):
    """The accuracy on the hold-out, with the result that it is of.

    Attributes:
        result: as in result.json.
    """

    result: dict[str, Any]

    @classmethod
    def of(cls, result: dict[str, Any]) -> "Score":
        """Take the accuracy on the hold-out from a result.

        Raises:
            ValueError: when it was not measured.
        """
        if HOLDOUT not in result:
            raise ValueError(
                f"the hold-out of {result.get('run')} was not measured, because it was trained without "
                "diagnostics=true: fresh=true trains it again"
            )
        score = cls(result[HOLDOUT])
        score.result = result
        return score


def is_search(hydra: Any) -> bool:
    """Tell whether a sweeper chooses the next jobs by what the last ones returned."""
    return str(hydra.mode) == "RunMode.MULTIRUN" and searches(hydra)


def searches(hydra: Any) -> bool:
    """Tell whether the sweeper of a configuration chooses jobs by results; for a sweep that has begun."""
    return str(hydra.sweeper._target_) != _EVERY


def check_search(hydra: Any, holdout: float, diagnostics: bool, dry_run: bool) -> None:
    """Check that a search maximizes the accuracy on a hold-out that is measured; the test set is not for choosing.

    Raises:
        ValueError: with what to set.
    """
    name = str(hydra.sweeper._target_).rpartition(".")[2]
    if dry_run:
        raise ValueError(f"{name} searches by results, and a dry run has none: leave hydra/sweeper= out")
    if hydra.sweeper.get("direction") != "maximize":
        raise ValueError(f"{name} is to maximize the accuracy on the hold-out: set hydra.sweeper.direction=maximize")
    if not (holdout and diagnostics):
        raise ValueError(
            f"{name} searches by the accuracy on a hold-out, never by the test set: set holdout=0.1 diagnostics=true, "
            "which measure it outside ε"
        )


def price(results: Sequence[dict[str, Any]], failed: int) -> str:
    """Say what the trials on each dataset spend together, next to the best of them, as the ledger composes runs.

    Args:
        results: of the trials, as in result.json; a run that two trials share counts once.
        failed: number of trials without a result.
    """
    runs = {result["run"]: result for result in results if HOLDOUT in result}
    groups: dict[tuple[Any, Any], list[dict[str, Any]]] = {}
    for run in runs.values():
        data = run.get("records_mac", run.get("data_mac"))  # the latter: of an earlier version
        groups.setdefault((run.get("fingerprint_key"), data), []).append(run)
    lines = []
    for group in groups.values():
        best, delta = max(group, key=lambda run: run[HOLDOUT]), max(run["delta"] for run in group)
        try:
            mechanisms = [release for run in group for release in _releases(run)]
            together = f"{compose_epsilon(mechanisms, delta):.4g}".replace("inf", "∞")
        except ValueError as error:
            together = f"unknown ({error})"
        alone = "∞" if math.isinf(best["epsilon"]) else f"{best['epsilon']:.4g}"
        lines.append(
            f"search: {len(group)} trials, together ε = {together} at δ = {delta:g}; the best one alone, "
            f"{best['run']}, ε = {alone}"
        )
    if failed:
        lines.append(f"{failed} trials without a result are not in this sum: dpopt ledger counts what they planned")
    lines.append("Whoever publishes the best model, or its settings, spends the ε of all trials together.")
    return "\n".join([*lines, CHOICE])


def _releases(run: dict[str, Any]) -> list[tuple[float, float, int]]:
    """List the Gaussians that a run's releases compose.

    Raises:
        ValueError: for a result of an earlier version that does not tell them.
    """
    if "releases" in run:
        return [(float(noise), float(rate), int(count)) for noise, rate, count in run["releases"]]
    if "mechanism" in run:
        raise ValueError(f"{run['run']} is of an earlier version, whose result does not say what its noise composes to")
    return [(run["noise_multiplier"], run["sample_rate"], run["steps"])]
