"""Train one network, or a sweep, under differential privacy.

dpopt train experiment=quickstart                      a minute on a laptop
dpopt train optimizer=dp_microadam epsilon=8           CIFAR-10, WRN-16-4
dpopt estimate optimizer=dp_microadam                  the plan only
dpopt train -m experiment=quickstart epsilon=1,3,8     a sweep

In a checkout `python run.py ...` is `dpopt train ...`.
"""

import os
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig

from dpopt.cli.arguments import complete_typed_line, flags_first, own_folders, parse
from dpopt.cli.refusals import full_error, one_sentence_each
from dpopt.config.overrides import check_overrides, from_hydra, with_weights
from dpopt.config.schema import CONF
from dpopt.runs.search import Score, check_search, is_search
from dpopt.runs.sweep import failed, report

_TURN = 30.0  # seconds for another process to speak; torchrun ends this one as soon as that one has ended


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _job(cfg: DictConfig) -> dict[str, Any] | Score:
    """Check the configuration, then plan and train; return a refusal as a failed result.

    A sweeper that searches gets the accuracy on the hold-out, and refusals as errors, which end its search.
    """
    config = None
    searches = is_search(HydraConfig.get())
    try:
        _refuse_sweep(HydraConfig.get().mode == RunMode.MULTIRUN)
        config = from_hydra(cfg)
        if searches:
            check_search(HydraConfig.get(), config.holdout, config.diagnostics, config.dry_run)
        from dpopt.training.run import run

        result = run(config)
        return Score.of(result) if searches else result
    except Exception as error:
        if config is not None and HydraConfig.get().mode == RunMode.MULTIRUN:
            from dpopt.training.run import note_failure

            note_failure(config, error)
        if getattr(error, "told", False) or (config is None and _another_says_it()):
            sys.exit(1)
        refusal = error.__cause__ or error if isinstance(error, InstantiationException) else error
        if full_error() or not isinstance(refusal, ValueError | OSError):
            raise
        if searches:
            raise HydraException(str(refusal)) from error
        return failed(refusal)


def _refuse_sweep(sweep: bool) -> None:
    """Refuse a sweep whose every run would be trained by all ranks."""
    if sweep and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "torchrun trains one run on several devices, and -m sweeps over several runs: drop one of the two, or give "
            "each run a device with hydra/launcher (docs/several_devices.md)"
        )


def _refuse_absent_cluster(overrides: Sequence[str]) -> None:
    """Refuse a job array where SLURM is not installed."""
    if {"hydra/launcher=slurm", "hydra/launcher=submitit_slurm"} & set(overrides) and not shutil.which("srun"):
        raise ValueError(
            "hydra/launcher=slurm needs SLURM's srun, which is not on this machine: start the sweep where jobs are "
            "submitted, or try it with hydra/launcher=submitit_local"
        )


def _another_says_it() -> bool:
    """Leave it to the first process of this machine, which has the same words, to say what is wrong with them."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return False
    time.sleep(_TURN)
    return True


def train(words: Sequence[str]) -> int:
    """Train what Hydra's overrides say; return the exit code.

    What is refused is printed in one sentence; HYDRA_FULL_ERROR=1 shows the stack.
    """
    code = 0
    try:
        arguments = parse(words)
        _refuse_sweep(arguments.multirun)
        if arguments.shell_completion:
            words = complete_typed_line(words)
        else:
            check_overrides(arguments.overrides, own_folders(arguments))
            _refuse_absent_cluster(arguments.overrides)
            words = with_weights(flags_first(words, arguments.overrides))
        sys.argv[1:] = words
        with one_sentence_each():
            _job()
    except ValueError as error:
        if full_error():
            raise
        if not _another_says_it():
            print(error, file=sys.stderr)
        code = 1
    except KeyboardInterrupt:  # after the current run has written its result
        code = 130
    finally:
        complete = report()  # also of a sweep that Hydra ended with an error
    return code or int(not complete)


def estimate(words: Sequence[str]) -> int:
    """Print the plan of a run or a sweep, and train nothing."""
    return train([*words, "dry_run=true"])
