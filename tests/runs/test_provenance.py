"""What a run goes on with: the code that it began with, or none."""

import importlib
import sys
from dataclasses import replace

import pytest

from dpopt.runs.identity import named
from dpopt.runs.provenance import code_hash
from dpopt.training import trainer
from dpopt.training.run import run

MODEL = """
from torch import nn
from {helper} import Scale

def net(num_classes: int, in_channels: int):
    return nn.Sequential(Scale(), nn.Flatten(), nn.Linear(64, num_classes))
"""
HELPER = """
from torch import nn

class Scale(nn.Module):
    def forward(self, x):
        return {factor} * x
"""


@pytest.fixture
def mine(tmp_path, monkeypatch, config):
    """A configuration with a model of one's own, and a function that edits what its module imports."""
    names = "net_of_mine", "layers_of_mine"
    monkeypatch.syspath_prepend(tmp_path)

    def write(factor):
        (tmp_path / f"{names[0]}.py").write_text(MODEL.format(helper=names[1]))
        (tmp_path / f"{names[1]}.py").write_text(HELPER.format(factor=factor))
        for name in names:
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        importlib.import_module(names[0])

    write("1.0")
    yield replace(config, steps=6, model={"_target_": f"{names[0]}.net"}), write
    for name in names:
        sys.modules.pop(name, None)


def killed(monkeypatch, after):
    """Kill a run after so many steps, as far as its files can tell."""
    real = trainer.Trainer.train_step

    def step(self, batch):
        if batch.step == after:
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(trainer.Trainer, "train_step", step)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint_every", [2, 50])
def test_no_other_code_takes_the_steps_after_a_checkpoint_again(mine, monkeypatch, checkpoint_every):
    """Before the first checkpoint, too: it would release other gradients under the same noise."""
    config, write = mine
    config = replace(config, checkpoint_every=checkpoint_every)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        killed(patch, 3)
        run(config)
    write("3.0")
    with pytest.raises(
        ValueError, match=r"written by a run with another code: restore that, or start again with fresh="
    ):
        run(config)
    write("1.0")
    assert run(config)["status"] == "finished"


def test_the_hash_follows_imports(mine):
    config, write = mine
    first = code_hash(named(config))
    assert (
        code_hash(named(replace(config, steps=7)))
        == first
        != code_hash(named(replace(config, model={"_target_": "torch.nn.Sequential"})))
    )
    write("3.0")
    assert code_hash(named(config)) != first
    write("1.0")
    assert code_hash(named(config)) == first
