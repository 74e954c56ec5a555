"""Sweepers that search, such as Optuna's: what they may choose by, and what a job returns to them.

This module imports no torch: Hydra imports it before anything else.
"""

from typing import Any

from dpopt.runs.result import HOLDOUT

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
    return str(hydra.mode) == "RunMode.MULTIRUN" and hydra.sweeper._target_ != _EVERY


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
