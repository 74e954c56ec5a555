"""Which runs a table consists of, what is on disk of them, and the commands that make them."""

import json
import shlex
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
from helpers import ROOT, configure, fake_jobs

from dpopt.runs import directory as run_files
from dpopt.runs.identity import locate, run_name
from dpopt.tables import spec
from dpopt.training.run import note_failure

NAMES = spec.names()


def test_a_failure_is_forgotten_once_the_run_begins(tmp_path):
    job = fake_jobs(tmp_path, "0")[0]
    note_failure(job.config, ValueError("no data"))
    assert job.result() == {"status": "failed", "error": "no data"}
    locate(job.config).mkdir()
    assert job.result() == {"status": "unfinished"}
    dry = replace(fake_jobs(tmp_path, "1")[0], config=replace(job.config, seed=7, dry_run=True))
    note_failure(dry.config, ValueError("no data"))
    assert dry.result() == {"status": "not run"}


def test_finished_runs_stay_finished_when_keys_are_added(tmp_path):
    """A key of the root or of a component that is younger than a result has its default in it."""
    job = fake_jobs(tmp_path, "0")[0]
    old = asdict(job.config)
    del old["ema"], old["checkpoint_every"], old["optimizer"]["weight_decay"]
    config = replace(job.config, ema=None)  # ema's default
    directory = tmp_path / "older"
    directory.mkdir()
    (directory / run_files.RESULT).write_text(json.dumps({"status": "finished", "test_accuracy": 0.5, "config": old}))
    assert locate(config) == directory and replace(job, config=config).directory() == directory
    for other in (replace(config, ema=0.5), replace(config, optimizer={**config.optimizer, "weight_decay": 0.1})):
        assert locate(other) != directory


def test_rows_are_what_the_words_sweep(tmp_path):
    """DP-PSASC: two optimizers, four s, at a sensitivity of 1."""
    about = spec.read("digits_parts")
    entry = next(entry for entry in about["tables"] if entry["title"] == "DP-PSASC")
    words = spec.words_of(about, entry, entry["rows"][1], "cpu")
    found = spec.expand(spec.merge(*words, "seed=0", "privacy=eps1,eps8", f"output_dir={tmp_path}"), label="psasc")
    assert len(found) == 2 * 4 * 2 and len({run_name(job.config) for job in found}) == 16
    assert {job.column for job in found} == {"eps1", "eps8"} and {job.config.seed for job in found} == {0}
    assert all(job.config.clip_norm == job.config.clipping["s"] for job in found)
    assert found[0].row == "psasc, optimizer=dp_sgd, s=1"
    digits = spec.read("digits")
    names = {job.row for job in spec.jobs(digits, digits["tables"][0], "smoke")}
    assert names == {p.stem for p in (ROOT / "conf/optimizer").glob("*.yaml")}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_no_command_comes_twice(name, nothing_run):
    lines = spec.commands(name, next(iter(spec.read(name)["sizes"])))
    assert len(lines) == len(set(lines)) and all(" run.py -m " in line for line in lines)
    assert bool(lines) == bool(spec.read(name)["tables"])


@pytest.mark.slow
def test_every_command_survives_the_shell_on_its_way(tmp_path, nothing_run):
    """As `dpopt table --run` sends them: what arrives is what was meant, `${steps}` included."""
    for name in ("ablation", "digits"):
        lines = spec.commands(name, list(spec.read(name)["sizes"])[-1])
        harmless = [line.replace(f"{sys.executable} run.py", "printf '%s\\n'").split(" >>")[0] for line in lines]
        done = subprocess.run("\n".join(harmless), shell=True, capture_output=True, text=True, cwd=tmp_path)
        wanted = [word for line in lines for word in shlex.split(line.split(" >>")[0])[2:]]
        assert done.stdout.splitlines() == wanted, done.stderr
    assert any("${steps}" in line for line in spec.commands("ablation", "full"))


def test_commands_make_the_missing_runs_of_the_size_and_no_others(monkeypatch, nothing_run):
    found = [shlex.split(line.split(" >>")[0])[3:] for line in spec.commands("cifar10", "cpu")]
    about = spec.read("cifar10")
    rows = about["tables"][0]["rows"]  # all optimizers, window 1, the controls, the large batch
    words = [spec.words_of(about, about["tables"][0], row, "cpu") for row in rows]
    wanted = [list(spec.merge(*row, f"seed={seed}")) for row in words for seed in range(3)]
    assert len(rows) == 4 and sorted(found) == sorted(wanted)

    def done(job):
        return {"status": "not run" if (job.row, job.config.seed) == ("dp_adamw", 2) else "finished"}

    monkeypatch.setattr(spec.Job, "result", done)
    (line,) = spec.commands("cifar10", "cpu")
    assert f" {about['base']} " in line and "seed=2 " in line


def test_the_later_of_two_words_with_one_key_counts():
    about = {"base": "a=1 b=1 c=1 d=1 e=1", "sizes": {"cpu": "b=2 c=2 d=2 e=2", "full": "x=1"}}
    entry = {"runs": "c=3 d=3 e=3", "at": {"cpu": "d=4 e=4", "full": "y=1"}}
    words = spec.words_of(about, entry, {"runs": "e=5 f='6 7'"}, "cpu")
    assert words == ("a=1", "b=2", "c=3", "d=4", "e=5", "f=6 7")
    with pytest.raises(ValueError, match="a row needs a label where nothing varies"):
        spec.expand(("experiment=quickstart", "privacy=eps8"))
    with pytest.raises(ValueError, match=r"a row needs epsilon=VALUES, its columns: privacy=eps8"):
        spec.expand(("privacy=eps8",), "epsilon")


def test_a_row_composes_as_its_command_does():
    """Groups are composed once and values set on top; Hydra, given the whole command, says the same."""
    groups = ("optimizer=dp_sgd", "privacy=eps3", "size=cpu")
    for words in (
        (*groups, "optimizer.momentum=0.5", "clip_norm=${clipping.s}", "clipping=psasc"),
        ("experiment=quickstart", "epsilon=1", "optimizer.betas=[0.0,0.999]", "steps=null", "epochs=3"),
        (*groups, "epsilon=null", "noise_multiplier=2", "optimizer.lr='${by_epsilon:3,{1: 2, 8: 4}}'"),
    ):
        (job,) = spec.expand((*words, "holdout=0.2"), "holdout", "row")
        assert job.config == configure(*words, "holdout=0.2")


def test_outside_of_a_checkout_one_sentence_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(spec, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=r"^tables are defined in experiments/ of a checkout, and .* is none: clone"):
        spec.names()


@pytest.mark.parametrize("name, size", [("deit", "cpu"), ("digits", "full")])
def test_a_size_that_a_table_lacks_is_refused_with_the_reason(name, size):
    with pytest.raises(ValueError, match=rf"not at size {size}, .*; it has smoke, "):
        spec.check_size(spec.read(name), size)
