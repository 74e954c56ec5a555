"""What a run directory is read back as: its model and its test set."""

from pathlib import Path

import torch
from torch import nn

from dpopt.config.schema import Config
from dpopt.data.sources import Source, as_source
from dpopt.runs.directory import WEIGHTS, read_config
from dpopt.tasks import Task
from dpopt.training.build import build_model, make_task


def load_test_set(config: Config, task: Task) -> Source:
    """Load the test set on the CPU."""
    device = torch.device("cpu")
    _, test = task.spec.load(Path(config.data_dir).expanduser(), device, config.workers)
    return as_source(test, device, config.workers)


def load(run_dir: str | Path) -> nn.Module:
    """Load the model of a run directory (the weight average, where one was kept), on the CPU, in eval mode.

    That of a run which was stopped is the model at the ε spent.

    Raises:
        ValueError: when the run has not ended or been stopped.
    """
    from safetensors.torch import load_file

    directory = Path(run_dir)
    if not (directory / WEIGHTS).exists():
        raise ValueError(f"{directory} holds no {WEIGHTS}: run the experiment to its end, or stop it, first")
    config = read_config(directory)
    model = build_model(config, make_task(config), offline=True)
    model.load_state_dict(load_file(directory / WEIGHTS))
    return model.eval()
