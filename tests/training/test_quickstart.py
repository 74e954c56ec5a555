"""What the README promises of the quickstart, and every component in a short private run."""

import json

import pytest
import torch
from helpers import ROOT

from dpopt.grad_sample import choices

pytestmark = pytest.mark.slow

GROUPS = ("optimizer", "clipping", "schedule", "filter", "estimator")


def results(tmp_path):
    return [json.loads(p.read_text()) for p in tmp_path.glob("runs/*/result.json")]


def test_the_quickstart_learns_and_noise_matters(command, tmp_path):
    done = command("train", "-m", "experiment=quickstart", "epsilon=8,0.1", "eval_every=150", "randomness=research")
    assert done.returncode == 0, done.stderr
    accuracy = {r["config"]["epsilon"]: r["test_accuracy"] for r in results(tmp_path)}
    assert accuracy[8.0] >= 0.94 and accuracy[0.1] < 0.5
    assert all(r["epsilon"] <= r["config"]["epsilon"] and r["delta"] <= 1e-4 for r in results(tmp_path))


@pytest.mark.parametrize("group", GROUPS)
def test_every_component_trains(command, tmp_path, group):
    names = [path for path in (ROOT / "conf" / group).glob("*.yaml") if path.stem != "federated"]  # wants clients
    needs = ["clipping=adaptive"] if group == "schedule" else ["optimizer=dp_sgd"] if group != "optimizer" else []
    # Least squares takes all examples in one step, and a linear model.
    needs += ["model=linear", "batch_size=1437"] if group == "estimator" else []
    short = ("steps=1" if group == "estimator" else "steps=4", "eval_every=2", "epsilon=1")
    done = command(
        "train",
        "-m",
        "experiment=quickstart",
        f"{group}=glob(*,exclude=federated)",
        "randomness=research",
        *needs,
        *short,
    )
    assert done.returncode == 0, done.stderr
    assert len(results(tmp_path)) == len(names) >= 2
    assert all(r["status"] == "finished" and r["epsilon"] <= 1 for r in results(tmp_path))


def test_a_run_takes_along_what_was_fastest(command, tmp_path, monkeypatch):
    """A resume computes as the run began, though the machine may have found something else since."""
    words = ("experiment=quickstart", "steps=4", "eval_every=4", "epsilon=1", "randomness=research")
    assert command("train", *words, "time_limit=0").returncode == 0
    (run,) = (tmp_path / "runs").iterdir()
    saved = torch.load(run / "checkpoint.pt", weights_only=True)["progress"]["choices"]
    assert any(name.startswith("convolution") for name in saved)
    monkeypatch.setattr(choices, "_remembered", lambda what, *_: pytest.fail(f"{what} was measured again"))
    done = command("train", *words)
    assert done.returncode == 0, done.stderr
    assert [result["status"] for result in results(tmp_path)] == ["finished"]
