"""Train one network, or a sweep, under differential privacy.

python run.py experiment=quickstart                      a minute on a laptop
python run.py optimizer=dp_microadam epsilon=8           CIFAR-10, WRN-16-4
python run.py optimizer=dp_microadam dry_run=true        the plan only
python run.py -m experiment=quickstart epsilon=1,3,8     a sweep

The function under @hydra.main is in dpopt/cli/train.py; `dpopt train ...` calls it, too.
"""

import sys

from dpopt.cli.train import train

if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
