"""Tables that run what is missing: as many processes as asked for, and a line for every run that ends."""

import re

import pytest
from helpers import fake_jobs, finish_run

from dpopt.cli import main
from dpopt.runs import directory as run_files
from dpopt.tables import launch, spec

pytestmark = pytest.mark.slow


@pytest.fixture
def staged(tmp_path, monkeypatch):
    """A table of four runs, one of which is there; the commands of the others copy or break them."""
    monkeypatch.setattr(launch, "_POLL", 0.05)
    jobs = fake_jobs(tmp_path / "runs", seeds="0")
    (tmp_path / "runs").mkdir()
    (tmp_path / "staged").mkdir()
    for job in jobs:
        finish_run(job, test_accuracy=0.5, wall_seconds=1, git_commit="c0ffee", device="cpu")
    commands = []
    for job in jobs[1:]:
        directory = job.directory()
        directory.rename(tmp_path / "staged" / job.name)
        commands.append(f"sleep 0.2; echo $DPOPT_JOB >>{tmp_path}/numbers; mv {tmp_path}/staged/{job.name} {directory}")
    broken = jobs[-1].directory()
    commands[-1] = f"mkdir {broken}; echo ValueError: no >{broken}/{run_files.ERROR}; exit 1"
    entry = {"title": "Accuracy", "runs": "x=1"}
    about = {"title": "Mine", "setting": "", "sizes": {"cpu": None}, "tables": [entry]}
    monkeypatch.setattr(spec, "names", lambda: ["mine"])
    monkeypatch.setattr(spec, "read", lambda name: about)
    monkeypatch.setattr(spec, "jobs", lambda about, entry, size: jobs)
    monkeypatch.setattr(spec, "words_of", lambda about, entry, row, size: ("x=1",))
    monkeypatch.setattr(spec, "commands", lambda name, size: commands)
    monkeypatch.setattr(spec, "ROOT", tmp_path)
    return tmp_path


def test_progress_names_runs_done_all_runs_and_the_time_left(staged, capsys):
    assert main(["table", "mine", "--run", "--jobs", "2", "--output", str(staged / "pages")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "1 of 4 runs done"
    assert any(re.fullmatch(r"[23] of 4 runs done(, 1 failed)?, [01] s, about [01] s left", line) for line in lines), (
        lines
    )
    assert re.fullmatch(r"3 of 4 runs done, 1 failed, [01] s", lines[-2])
    assert lines[-1] == "mine, size cpu: 3 of 4 runs are finished"
    assert sorted((staged / "numbers").read_text().split()) == ["0", "1"]
    assert "failed: ValueError: no" in (staged / "pages/mine/cpu/table.md").read_text()


def test_an_interrupted_table_waits_for_its_runs(staged, monkeypatch):
    def interrupt(progress):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch.Progress, "show", interrupt)
    assert main(["table", "mine", "--run", "--jobs", "2", "--output", str(staged / "pages")]) == 130
    assert len((staged / "numbers").read_text().split()) == 2 and not (staged / "pages").exists()
