"""Train one network, or a sweep, under differential privacy.

python run.py experiment=quickstart                      a minute on a laptop
python run.py optimizer=dp_microadam epsilon=8           CIFAR-10, WRN-16-4
python run.py optimizer=dp_microadam dry_run=true        the plan only
python run.py -m experiment=quickstart epsilon=1,3,8     a sweep
"""

import sys
from collections.abc import Sequence
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig

from dpopt.config.overrides import check_overrides, from_hydra
from dpopt.config.schema import CONF


class UserError(CompactHydraException, ValueError):
    """Printed as one sentence, with exit code 1; HYDRA_FULL_ERROR=1 shows the stack."""


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _job(cfg: DictConfig) -> dict[str, Any]:
    """Check the configuration, then plan and train."""
    config = None
    try:
        config = from_hydra(cfg)
        from dpopt.training.run import run

        return run(config)
    except Exception as error:
        if config is not None and HydraConfig.get().mode == RunMode.MULTIRUN:
            from dpopt.training.run import note_failure

            note_failure(config, error)
        if isinstance(error, InstantiationException):
            raise UserError(str(error.__cause__ or error)) from error
        if isinstance(error, ValueError | OSError):
            raise UserError(str(error)) from error
        raise


def train(words: Sequence[str]) -> None:
    """Train what Hydra's overrides say; exit with a sentence where they cannot be followed."""
    sys.argv[1:] = words
    try:
        check_overrides(words)
        _job()
    except ValueError as error:  # an unknown key; Hydra's own message is misleading
        sys.exit(str(error))
    except KeyboardInterrupt:  # after the current run has written its result
        sys.exit(130)
