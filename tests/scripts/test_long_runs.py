"""The script of long runs, in few steps: what it measures is what it says."""

import torch
from helpers import ROOT

import dpopt


def load(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import long_runs

    return long_runs


def test_page_and_figure(monkeypatch, tmp_path):
    script = load(monkeypatch)
    monkeypatch.setattr("sys.argv", ["long_runs.py", "--steps", "30", "--output", str(tmp_path)])
    script.main()
    text = (tmp_path / "long_runs.md").read_text()
    assert (tmp_path / "long_runs.png").stat().st_size > 10_000
    assert text.count("\n| MicroAdam") == 2 * len(script.FORMS) and text.count("\n| Adam |") == 2
    assert "30 steps" in text and "nan" not in text


def test_the_drift_of_microadam_that_is_adam_is_zero(monkeypatch):
    """With every value selected, nothing rounded and an infinite window."""
    script = load(monkeypatch)
    problem = script.digits()
    adam = script.course(problem, lambda p: torch.optim.Adam(p, lr=problem.lr), 25, None)
    whole = dict(density=1.0, window=None, bits=32, scope="tensor", dense_size=0)
    same = script.course(problem, lambda p: dpopt.optim.MicroAdam(p, lr=problem.lr, **whole), 25, adam)
    assert len(same.drift) == len(adam.loss) == 25 and max(same.drift) < 1e-3 and same.accuracy == adam.accuracy
    sparse = dict(density=0.01, dense_size=256)
    other = script.course(problem, lambda p: dpopt.optim.MicroAdam(p, lr=problem.lr, **sparse), 25, adam)
    assert min(other.drift) > 0.1 and min(other.feedback) > 1e-3


def test_microadam_leaves_the_start_of_the_quadratic_and_adam_does_not(monkeypatch):
    script = load(monkeypatch)
    problem = script.quadratic()
    adam = script.course(problem, lambda p: torch.optim.Adam(p, lr=problem.lr), 2000, None)
    options = dict(density=problem.density, dense_size=256, bits=2)
    micro = script.course(problem, lambda p: dpopt.optim.MicroAdam(p, lr=problem.lr, **options), 2000, adam)
    assert adam.loss[-1] < 1e-3 * adam.begin and micro.loss[-1] > 1.5 * micro.begin
    assert min(micro.factors) > 1 and len(micro.factors) == 2 and micro.feedback[-1] > 2 * micro.feedback[0]


def test_the_last_step_is_recorded(monkeypatch):
    script = load(monkeypatch)
    for steps in (1, 7, 100, 1234, 100_000):
        at = script.record_steps(steps)
        assert max(at) == steps and min(at) >= 1 and len(at) == min(steps, 100)
