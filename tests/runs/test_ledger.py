"""The ledger: every private run is in it, and runs on one dataset are composed."""

import json
from dataclasses import replace

import pytest
from helpers import make_plan

from dpopt.cli.ledger import overview
from dpopt.data.fingerprint import home
from dpopt.privacy.accounting import compose_epsilon, compute_epsilon
from dpopt.runs.ledger import Ledger, by_data, spending, total_epsilon
from dpopt.training import trainer
from dpopt.training.run import run

pytestmark = pytest.mark.slow

ABOUT = {"name": "a", "dataset": "digits", "data": "ff" * 32, "key_id": "k"}


def test_composition_equals_one_long_training_and_exceeds_each_part():
    together = compose_epsilon([(1.5, 0.04, 400), (1.5, 0.04, 600)], 1e-5)
    assert together == pytest.approx(compute_epsilon(1.5, 0.04, 1000, 1e-5), rel=1e-9)
    mixed = compose_epsilon([(1.5, 0.04, 400), (2.0, 0.1, 100), (0.4, 0.01, 20)], 1e-5)
    parts = [compute_epsilon(1.5, 0.04, 400, 1e-5), compute_epsilon(2.0, 0.1, 100, 1e-5)]
    parts.append(compute_epsilon(0.4, 0.01, 20, 1e-5))
    assert max(parts) < mixed < sum(parts)
    nearly = compose_epsilon([(1.5, 0.04, 400), (1.5 + 1e-9, 0.04, 600)], 1e-5)  # by two distributions
    assert nearly == pytest.approx(together, rel=1e-4)
    assert compose_epsilon([(1.5, 0.04, 0)], 1e-5) == 0
    assert compose_epsilon([(0.0, 0.04, 1), (1.0, 0.1, 1)], 1e-5) == float("inf")


def test_private_runs_are_in_it_finished_or_not(config, monkeypatch):
    run(config)
    run(replace(config, tag="stopped", time_limit=0.0))
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(trainer, "poisson_batches", lambda *_: 1 / 0)
        run(replace(config, tag="killed"))
    for silent in (dict(randomness="research"), dict(ledger="off", tag="off"), dict(private=False, epsilon=None)):
        run(replace(config, **silent))
    first, second, third = Ledger(home()).runs()
    assert [(r.status, r.steps) for r in (first, second, third)] == [("finished", 3), ("time_limit", 1), ("planned", 3)]
    assert len({r.data for r in (first, second, third)}) == 1 and first.name.startswith("digits-cnn-")
    assert (home() / "ledger.jsonl").stat().st_mode & 0o077 == 0
    run(replace(config, tag="stopped"))  # goes on: the same run
    assert [(r.status, r.steps) for r in Ledger(home()).runs()] == [("finished", 3), ("finished", 3), ("planned", 3)]
    text = overview(None, True)
    total = total_epsilon(Ledger(home()).runs(), 1e-4)
    assert f"3 runs, together ε = {total:.4g}" in text and "training only" in text and 1 < total < 3


def test_other_hold_outs_of_one_dataset_are_added_up(config):
    for seed in range(3):
        run(replace(config, seed=seed, holdout=0.1))
    runs = Ledger(home()).runs()
    assert len(by_data(runs)) == 1 and len({one.run for one in runs}) == 3


def test_runs_on_different_data_are_not_added_up():
    plan = make_plan()
    book = Ledger(home())
    for run_id, data in (("1", "aa"), ("2", "aa"), ("3", "bb")):
        book.add(spending(plan, 5, "finished", run=run_id, **ABOUT | {"data": data}))
    groups = by_data(book.runs())
    assert [len(group) for group in groups.values()] == [2, 1]
    both, alone = (total_epsilon(group, 1e-3) for group in groups.values())
    assert both == pytest.approx(plan.epsilon_at(10), rel=1e-9) and alone == pytest.approx(plan.epsilon_at(5), rel=1e-9)


def test_what_cannot_be_written_or_read_is_one_sentence(tmp_path, monkeypatch):
    book = Ledger(home())
    book.add(spending(make_plan(), 5, "finished", run="1", **ABOUT))
    with book.path.open("a") as file:
        file.write(json.dumps({"run": "2"}) + "\n")
    with pytest.raises(ValueError, match="line 2 of the ledger"):
        book.runs()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot be written .*set DPOPT_HOME"):
        Ledger(tmp_path / "file" / "below").add(spending(make_plan(), 5, "finished", run="1", **ABOUT))
