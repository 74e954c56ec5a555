"""What Hydra refuses, in one sentence."""

import difflib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import hydra._internal.utils as hydra_utils
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

_DETAILS = ("full_key:", "reference_type=", "object_type=", "See https://")
_OPTUNA = ": its plugin is not installed (pip install hydra-optuna-sweeper)"
_INTERVAL = (
    "interval(…) is for a sweeper that searches, such as hydra/sweeper=optuna (pip install hydra-optuna-sweeper): "
    "without one list the values, as in epsilon=1,3,8"
)


def full_error() -> bool:
    """Tell whether the user asks for stacks instead of sentences."""
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


@contextmanager
def one_sentence_each() -> Iterator[None]:
    """Raise Hydra's refusals as ValueErrors of one sentence; a bug keeps its traceback.

    Hydra prints its refusals itself, in several lines, and exits.
    """
    report = hydra_utils.run_and_report

    def run(func: Any) -> Any:
        try:
            return func()
        except (HydraException, OmegaConfBaseException) as error:
            if full_error():
                raise
            raise ValueError(sentence(error)) from error
        except Exception as error:
            report(_raising(error))

    hydra_utils.run_and_report = run
    try:
        yield
    finally:
        hydra_utils.run_and_report = report


def sentence(error: Exception) -> str:
    """Write an error of Hydra in one line."""
    text = str(error)
    if "does not support sweep type" in text:
        return _INTERVAL
    if text.startswith("Could not override") and (said := _unknown_option(error.__cause__)):
        return said
    if isinstance(error.__cause__, OmegaConfBaseException) and str(error.__cause__) not in text:
        text += f":\n{error.__cause__}"
    lines = [line for line in text.partition("Config search path:")[0].splitlines() if line.strip()]
    lines = [line for line in lines if not line.strip().startswith(_DETAILS)]
    written = ""
    for before, line in zip(["", *lines], lines, strict=False):
        item = line.startswith("\t") and before.startswith("\t")  # Hydra lists choices with a tab before each
        written += ", " if item else " " if not written or written.endswith((".", ":", ",")) else ". "
        written += line.strip()
    return written.strip() + (_OPTUNA if "'hydra/sweeper/optuna'" in written else "")


def _unknown_option(error: Any) -> str:
    """Name an option that its group does not have, and the one that was meant; empty for any other error."""
    group, name = getattr(error, "parent_node", None), getattr(error, "key", None)
    if not isinstance(group, DictConfig) or not isinstance(name, str) or name in group:
        return ""
    options = [str(option) for option in group if not str(option).startswith("_")]
    path, meant = error.full_key, difflib.get_close_matches(name, options, 1)
    known = f": {path.removesuffix(f'.{name}')} has {', '.join(options)}" if options else ""
    hint = f": did you mean {path.removesuffix(name)}{meant[0]}?" if meant else known
    return f"{path} is no option{hint} (+{path}=VALUE adds one that its class takes)"


def _raising(error: Exception) -> Callable[[], Any]:
    """Make a function that raises the error."""

    def function() -> None:
        raise error

    return function
