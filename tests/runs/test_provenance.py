"""What a run goes on with: the code that it began with, or none."""

import importlib
import sys
from dataclasses import replace

import pytest

from dpopt.data.sources import TensorSource
from dpopt.runs import provenance
from dpopt.runs.identity import component_strings
from dpopt.runs.provenance import code_hash
from dpopt.training import trainer
from dpopt.training.run import run

MODEL = """
from torch import nn
from {helper} import Scale

def unused():
    from {late} import LATER

def net(num_classes: int, in_channels: int):
    return nn.Sequential(Scale(), nn.Flatten(), nn.Linear(64, num_classes))
"""
HELPER = """
from torch import nn
from numbers_of.mine import FACTOR

class Scale(nn.Module):
    def forward(self, x):
        return FACTOR * x
"""


@pytest.fixture
def mine(tmp_path, monkeypatch, config):
    """A configuration with a model of one's own, and a function that edits what its modules import.

    A number in a folder without __init__.py, and a module that a function would import.
    """
    names = "net_of_mine", "layers_of_mine", "numbers_of.mine", "numbers_of"
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "numbers_of").mkdir()

    def write(factor, later=1):
        (tmp_path / f"{names[0]}.py").write_text(MODEL.format(helper=names[1], late="late_of_mine"))
        (tmp_path / f"{names[1]}.py").write_text(HELPER)
        (tmp_path / "numbers_of/mine.py").write_text(f"FACTOR = {factor}\n")
        (tmp_path / "late_of_mine.py").write_text(f"LATER = {later}\n")
        provenance._digest.cache_clear()  # as in another process
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
    first = code_hash(component_strings(config))
    assert (
        code_hash(component_strings(replace(config, steps=7)))
        == first
        != code_hash(component_strings(replace(config, model={"_target_": "torch.nn.Sequential"})))
    )
    write("3.0")
    assert code_hash(component_strings(config)) != first
    write("1.0", later=2)
    assert code_hash(component_strings(config)) != first
    write("1.0")
    assert code_hash(component_strings(config)) == first


@pytest.mark.slow
def test_what_fails_before_its_first_release_may_be_mended(mine, monkeypatch):
    config, write = mine
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        killed(patch, 0)
        run(config)
    write("3.0")
    assert run(config)["status"] == "finished"


@pytest.mark.slow
def test_what_fails_once_more_before_it_releases_again_may_not(mine, monkeypatch):
    """The first process has released three steps, from the same checkpoint."""
    config, write = mine
    for after in (3, 0):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            killed(patch, after)
            run(config)
    write("3.0")
    with pytest.raises(ValueError, match="written by a run with another code"):
        run(config)


@pytest.mark.slow
def test_no_other_settings_of_the_data_go_on_with_a_checkpoint(config, monkeypatch):
    """Its noise is keyed by them; a finished result is not that of others."""
    config = replace(config, steps=6, checkpoint_every=2)
    real = TensorSource.__post_init__
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        killed(patch, 3)
        run(config)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="a run with another dataset"):
        patch.setattr(TensorSource, "__post_init__", lambda self: (object.__setattr__(self, "crop", 1), real(self))[1])
        run(config)
    assert run(config)["status"] == "finished"
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="was trained on other data"):
        patch.setattr(TensorSource, "__post_init__", lambda self: (object.__setattr__(self, "crop", 1), real(self))[1])
        run(config)
