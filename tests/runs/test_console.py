"""What a person sees: lines are left to the terminal, tables are as wide as it."""

import pytest
from helpers import configure

from dpopt.privacy.audit import BOUNDS, AuditResult
from dpopt.privacy.noise import NOISE_VERSION
from dpopt.runs import console
from dpopt.runs.audit_report import audit_table
from dpopt.training.run import run

RESULT = {"test_accuracy": 0.5, "epsilon": 8.0, "git_commit": "a" * 40, "noise_version": NOISE_VERSION - 1}


@pytest.mark.parametrize("columns", ["40", "200"])
def test_hints_are_lines_that_the_terminal_wraps(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    console.already_finished(RESULT, "runs/" + 80 * "x", "b" * 40, "its data [here] were not compared: " + 90 * "y ")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and len(lines[0]) > 120 and len(lines[1]) > 120 and "[here]" in lines[1]


def test_the_table_of_an_audit_is_as_wide_as_the_terminal(monkeypatch):
    values = dict.fromkeys(BOUNDS, 1.0)
    result = AuditResult(100, 50, 8.0, 1e-5, 0.05, 0.1, values, values)

    def lines(columns):
        monkeypatch.setenv("COLUMNS", columns)
        return audit_table(result, "name").splitlines()

    narrow, wide = lines("70"), lines("300")
    assert len(narrow) > len(wide)
    assert len(wide) == len(BOUNDS) + 7


@pytest.mark.parametrize(
    "words, gradients, known",
    [
        ("experiment=quickstart", "gradients per example", True),
        ("experiment=quickstart estimator=zeroth_order", "gradients none: two losses per example", True),
        ("experiment=federated", "gradients none: the update of each client", False),
        ("experiment=least_squares", "gradients none: features of each example", False),
    ],
)
def test_the_plan_says_what_is_taken_and_no_cost_of_something_else(capsys, words, gradients, known):
    guess = run(configure(*words.split(), "dry_run=true"))
    assert gradients in " ".join(capsys.readouterr().out.split())
    assert (guess["seconds"] is not None) == (guess["memory_bytes"] is not None) == known
