"""Shared fixtures: results are looked up afresh, or nothing has been run."""

import pytest

from dpopt.tables import spec


@pytest.fixture(autouse=True)
def no_results_remembered():
    spec._finished.cache_clear()
    spec._page.clear()


@pytest.fixture
def nothing_run(monkeypatch):
    monkeypatch.setattr(spec.Job, "result", lambda job: {"status": "not run"})
