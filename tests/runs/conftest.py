"""A user's folder for each test, and a run of three steps."""

from dataclasses import replace

import pytest
from helpers import configure


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("DPOPT_HOME", str(tmp_path / "home"))


@pytest.fixture
def config(tmp_path):
    short = dict(steps=3, batch_size=64, eval_every=3, epsilon=1.0, output_dir=str(tmp_path / "runs"))
    return replace(configure("experiment=quickstart"), **short)
