"""What the README promises of the quickstart, and every component in a short private run."""

import json

import pytest
from conftest import ROOT

OPTIMIZERS = sorted(p.stem for p in (ROOT / "conf/optimizer").glob("*.yaml"))
CLIPPINGS = sorted(p.stem for p in (ROOT / "conf/clipping").glob("*.yaml"))
SCHEDULES = sorted(p.stem for p in (ROOT / "conf/schedule").glob("*.yaml"))


def results(tmp_path):
    return [json.loads(p.read_text()) for p in tmp_path.glob("runs/*/result.json")]


def test_the_quickstart_learns_and_noise_matters(cli, tmp_path):
    done = cli("-m", "+experiment=quickstart", "epsilon=8,0.1", "eval_every=150")
    assert done.returncode == 0, done.stderr
    accuracy = {r["config"]["epsilon"]: r["test_accuracy"] for r in results(tmp_path)}
    assert accuracy[8.0] >= 0.94 and accuracy[0.1] < 0.5
    assert all(r["epsilon"] <= r["config"]["epsilon"] and r["delta"] <= 1e-4 for r in results(tmp_path))


@pytest.mark.parametrize(
    "group, names", [("optimizer", OPTIMIZERS), ("clipping", CLIPPINGS), ("schedule", SCHEDULES)], ids=str
)
def test_every_component_trains(cli, tmp_path, group, names):
    done = cli("-m", "+experiment=quickstart", f"{group}=glob(*)", "steps=4", "eval_every=2", "epsilon=1")
    assert done.returncode == 0, done.stderr
    assert len(results(tmp_path)) == len(names) >= 2
    assert all(r["status"] == "finished" and r["epsilon"] <= 1 for r in results(tmp_path))
