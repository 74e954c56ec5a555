"""Train one network, or a sweep, under differential privacy.

dpopt train experiment=quickstart                      a minute on a laptop
dpopt train optimizer=dp_microadam epsilon=8           CIFAR-10, WRN-16-4
dpopt estimate optimizer=dp_microadam                  the plan only
dpopt train -m experiment=quickstart epsilon=1,3,8     a sweep

In a checkout `python run.py ...` is `dpopt train ...`.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig

from dpopt.cli.arguments import complete_typed_line, flags_first, own_folders, parse
from dpopt.config.overrides import check_overrides, from_hydra
from dpopt.config.schema import CONF
from dpopt.runs.sweep import report_sweeps


class UserError(CompactHydraException, ValueError):
    """Printed as one sentence, with exit code 1; HYDRA_FULL_ERROR=1 shows the stack."""


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _job(cfg: DictConfig) -> dict[str, Any]:
    """Check the configuration, then plan and train."""
    config = None
    try:
        _refuse_sweep(HydraConfig.get().mode == RunMode.MULTIRUN)
        config = from_hydra(cfg)
        from dpopt.training.run import run

        return run(config)
    except Exception as error:
        if config is not None and HydraConfig.get().mode == RunMode.MULTIRUN:
            from dpopt.training.run import note_failure

            note_failure(config, error)
        if getattr(error, "told", False) or (config is None and _another_says_it()):
            sys.exit(1)
        if isinstance(error, InstantiationException):
            raise UserError(str(error.__cause__ or error)) from error
        if isinstance(error, ValueError | OSError):
            raise UserError(str(error)) from error
        raise


def _refuse_sweep(sweep: bool) -> None:
    """Refuse a sweep whose every run would be trained by all ranks."""
    if sweep and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "torchrun trains one run on several devices, and -m sweeps over several runs: drop one of the two, or give "
            "each run a device with hydra/launcher (docs/several_devices.md)"
        )


def _another_says_it() -> bool:
    """Tell whether another process of this machine was given the same words, and says what is wrong with them."""
    return os.environ.get("LOCAL_RANK", "0") != "0"


def train(words: Sequence[str]) -> int:
    """Train what Hydra's overrides say; return the exit code.

    Hydra itself exits where a run fails, with the error in one sentence.
    """
    try:
        arguments = parse(words)
        _refuse_sweep(arguments.multirun)
        if arguments.shell_completion:
            words = complete_typed_line(words)
        else:
            check_overrides(arguments.overrides, own_folders(arguments))
            words = flags_first(words, arguments.overrides)
        sys.argv[1:] = words
        _job()
    except ValueError as error:  # an unknown key; Hydra's own message is misleading
        if not _another_says_it():
            print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # after the current run has written its result
        return 130
    finally:
        report_sweeps()  # also of a sweep that Hydra ended with an error
    return 0


def estimate(words: Sequence[str]) -> int:
    """Print the plan of a run or a sweep, and train nothing."""
    return train([*words, "dry_run=true"])
