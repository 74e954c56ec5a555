"""`dpopt audit` and audited runs: what is written, printed and returned, and that training stays as it is."""

import json

import pytest
from helpers import configure
from safetensors.torch import load_file

from dpopt.runs import directory
from dpopt.runs.audit_report import read_audit
from dpopt.runs.identity import run_name
from dpopt.training import trainer

pytestmark = pytest.mark.slow

SHORT = ("experiment=quickstart", "model=linear", "steps=8", "batch_size=64", "eval_every=8", "randomness=research")


def only(folder):
    (found,) = (p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    return found


def test_an_audited_run(command, tmp_path):
    words = (*SHORT, "audit=300", f"output_dir={tmp_path}/runs")
    done = command("audit", *words)
    assert done.returncode == 0, done.stderr
    assert "GDP " in done.stdout and "300 canaries" in done.stdout and "is not refuted" in done.stdout
    run = only(tmp_path / "runs")
    stored = json.loads((run / directory.AUDIT).read_text())
    assert stored["canaries"] == 300 and set(stored["bounds"]) == set(stored["ceilings"]) == set(stored["assumptions"])
    assert stored["refuted_by"] == [] and (run / directory.ROC).read_bytes()[:4] == b"\x89PNG"
    card = (run / directory.CARD).read_text()
    assert "## Audit" in card and "| GDP |" in card and card.index("## Audit") < card.index("## Not accounted")
    for again in (command("audit", *words), command("audit", str(run))):
        assert again.returncode == 0 and "audit of " in again.stdout
    values = {**stored, "bounds": {**stored["bounds"], "GDP": 99.0}}
    (run / directory.AUDIT).write_text(json.dumps(values))
    refuted = command("audit", str(run))
    assert refuted.returncode == 1 and "is refuted: GDP bound." in refuted.stdout


def test_a_run_without_an_audit_is_trained_again(command, tmp_path):
    assert command("train", *SHORT).returncode == 0
    plain = only(tmp_path / "runs")
    done = command("audit", "--black-box", str(plain))
    assert done.returncode == 1 and "needs a run with holdout=" in done.stderr
    assert not (plain / directory.AUDIT).exists() and "## Audit" not in (plain / directory.CARD).read_text()
    done = command("audit", str(plain))
    assert done.returncode == 0, done.stderr
    (audited,) = (p for p in (tmp_path / "runs").iterdir() if (p / directory.AUDIT).exists())
    assert audited != plain and read_audit(audited).canaries == 10_000


def test_the_model_is_the_same_with_and_without(command, tmp_path, monkeypatch):
    """Under one key: that of a run follows from its identity, of which the audit is a part."""
    monkeypatch.setattr(trainer, "identity_hash", lambda config: "one key")
    weights = []
    for name, words in {"plain": (), "audited": ("audit=50",)}.items():
        assert command("train", *SHORT, *words, f"output_dir={tmp_path}/{name}").returncode == 0
        weights.append((only(tmp_path / name) / directory.WEIGHTS).read_bytes())
    assert weights[0] == weights[1] and load_file(only(tmp_path / "plain") / directory.WEIGHTS)


def test_an_interrupted_audit_continues(command, tmp_path):
    results = []
    for name, limits in {"whole": (None,), "parts": ("0", None)}.items():
        for limit in limits:
            words = () if limit is None else (f"time_limit={limit}",)
            assert command("train", *SHORT, "audit=200", *words, f"output_dir={tmp_path}/{name}").returncode == 0
            assert (only(tmp_path / name) / directory.AUDIT).exists() == (limit is None)
        results.append(read_audit(only(tmp_path / name)))
    assert results[0] == results[1] and not results[0].refuted_by


def test_identity():
    plain = run_name(configure(*SHORT))
    assert run_name(configure(*SHORT, "audit=0")) == run_name(configure(*SHORT, "audit=false")) == plain
    assert run_name(configure(*SHORT, "audit=true")) == run_name(configure(*SHORT, "audit=10000")) != plain


@pytest.mark.parametrize(
    "words, meant",
    [
        ((*SHORT, "audit=3"), "audit=3 must be true"),
        (("experiment=quickstart", "privacy=none"), "drop audit"),
        (("experiment=quickstart", "epslon=8"), "epslon is no key"),
        (("experiment=quickstart", "optimizer=none_such"), "Could not find 'optimizer/none_such'"),
        (("experiment=quickstart", "model.weights=nowhere"), "nowhere is no directory of a run"),
        (
            ("experiment=quickstart", "+model.num_classes=7"),
            "model.num_classes=7 contradicts the dataset, which has 10",
        ),
        (("--black-box", "nowhere"), "nowhere holds no"),
    ],
    ids=str,
)
def test_refused_in_a_sentence(command, words, meant):
    done = command("audit", *words)
    assert done.returncode == 1 and meant in done.stderr and done.stderr.count("\n") == 1


def test_black_box(command, tmp_path):
    assert command("train", *SHORT, "holdout=0.2").returncode == 0
    done = command("audit", "--black-box", str(only(tmp_path / "runs")))
    assert done.returncode == 0 and "black box: ε ≥ 0.00" in done.stdout and "next to nothing" in done.stdout, (
        done.stderr
    )
