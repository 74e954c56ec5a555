"""Train one network, or a sweep, under differential privacy.

python run.py +experiment=quickstart                     a minute on a laptop
python run.py optimizer=dp_microadam epsilon=8           CIFAR-10, WRN-16-4
python run.py optimizer=dp_microadam dry_run=true        the plan only
python run.py -m +experiment=quickstart epsilon=1,3,8    a sweep
"""

import sys
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig

from dpopt.config import check_words, from_hydra


class UserError(CompactHydraException, ValueError):
    """Printed as one sentence, with exit code 1; HYDRA_FULL_ERROR=1 shows the stack."""


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> dict[str, Any]:
    """Check the configuration, then plan and train."""
    config = None
    try:
        config = from_hydra(cfg)
        from dpopt.train import run

        return run(config)
    except Exception as error:
        if config is not None and HydraConfig.get().mode == RunMode.MULTIRUN:
            from dpopt.store import note_failure

            note_failure(config, error)
        if isinstance(error, InstantiationException):
            raise UserError(str(error.__cause__ or error)) from error
        if isinstance(error, ValueError | OSError):
            raise UserError(str(error)) from error
        raise


if __name__ == "__main__":
    try:
        check_words(sys.argv[1:])
        main()
    except ValueError as error:  # a key that is not there; what Hydra would say of it leads astray
        sys.exit(str(error))
    except KeyboardInterrupt:  # after the run in hand has written its result
        sys.exit(130)
