"""`dpopt table`: pages and figures are written, and not over fuller ones; commands and plans are printed."""

import csv
import shlex
import shutil
import subprocess

import pytest
from helpers import ROOT, finish_run

from dpopt.cli import main
from dpopt.tables import figures, render, spec
from dpopt.training.run import note_failure

pytestmark = pytest.mark.slow


def test_tables_are_not_overwritten_by_emptier_ones(tmp_path, monkeypatch, capsys):
    words = ["dp_psasc", "--size", "full", "--output", str(tmp_path)]
    folder = tmp_path / "dp_psasc" / "full"
    assert main(["table", *words]) == 0 and (folder / "table.md").exists() and (folder / "table.tex").exists()
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["status"], ["finished"]])
    (folder / "table.md").write_text("kept")
    with monkeypatch.context() as patch:
        patch.setattr(figures, "draw", lambda *_: pytest.fail("drew figures of fewer runs"))
        assert main(["table", *words]) == 0 and (folder / "table.md").read_text() == "kept"
    out = capsys.readouterr().out
    assert "--force overwrites" in out and "--output names another folder" in out
    assert main(["table", *words, "--force"]) == 0 and (folder / "table.md").read_text() != "kept"


def test_a_page_of_another_machine_is_added_to(tmp_path, monkeypatch, capsys):
    """Its runs count, commands make only what it lacks, nothing on it changes, and figures of curves are kept."""
    words = "experiment=quickstart optimizer=dp_sgd,dp_psasc_momentum privacy=eps1,eps8 seed=0,1"
    figure = {"name": "curves", "kind": "curves", "table": "Mine", "title": "Curves", "column": "eps8"}
    about = {"title": "Mine", "setting": "", "sizes": {"cpu": f"output_dir={tmp_path}/runs"}}
    about |= {"tables": [{"title": "Mine", "runs": words}], "figures": [figure]}
    monkeypatch.setattr(spec, "read", lambda name: about)
    (tmp_path / "runs").mkdir()
    jobs = spec.jobs(about, about["tables"][0], "cpu")
    lacking = [jobs[0], jobs[-1]]
    measured = {"wall_seconds": 1.5, "git_commit": "12345678", "device": "cpu", "versions": {"torch": "2.15.0"}}
    measured |= {"dataset_size": 1000, "noise_version": 3, "epsilon": 0.25, "trainable_parameters": 10}
    for number, job in enumerate(jobs):
        if job not in lacking:
            finish_run(job, test_accuracy=0.1 * number, test_loss=1.0, **measured)
    command = ["table", "mine", "--output", str(tmp_path)]
    page, image = (tmp_path / "mine/cpu" / name for name in ("table.csv", "curves.png"))
    assert main(command) == 0
    before = page.read_text()
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "runs").mkdir()
    image.write_text("of all runs")
    capsys.readouterr()
    assert main([*command, "--add", "--commands"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [set(job.words) - set(line) for job, line in zip(lacking, lines, strict=True)] == [set(), set()]
    assert main([*command, "--add"]) == 0 and page.read_text() == before and image.read_text() == "of all runs"
    finish_run(jobs[0], test_accuracy=0.9, test_loss=1.0, **measured)
    note_failure(jobs[1].config, ValueError("no data"))  # what is on the page has not failed
    spec._page.clear()
    assert main(command) == 0 and page.read_text() == before  # one run is less than the page holds
    assert main([*command, "--add"]) == 0
    after = page.read_text()
    kept = [line for line in before.splitlines() if "finished" in line]
    assert set(kept) < set(after.splitlines()) and after.count("finished") == before.count("finished") + 1
    assert "kept as it is: some of its runs are on the page and not here" in capsys.readouterr().out
    page.write_text(before.replace(jobs[1].name, "a-run-of-1234abcdef"))
    assert main([*command, "--add"]) == 1
    assert (
        "holds a-run-of-1234abcdef, which is no run of the table now: it cannot be added to" in capsys.readouterr().err
    )
    assert main(["table", "mine", "other", "--add"]) == 1 and "name it" in capsys.readouterr().err


def test_a_figure_alone_has_no_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "_mean_square_gradient", lambda make, steps, seed: 1 / steps)
    assert main(["table", "convergence", "--output", str(tmp_path)]) == 0
    folder = tmp_path / "convergence" / "cpu"
    assert [path.name for path in folder.iterdir()] == ["convergence.png"]
    assert capsys.readouterr().out.strip() == str(folder / "convergence.png")


def test_a_page_embeds_the_figures_in_its_folder(tmp_path, nothing_run):
    folder = tmp_path / "ablation" / "smoke"
    folder.mkdir(parents=True)
    (folder / "density.png").touch()
    text = render.write("ablation", "smoke", tmp_path)
    assert text.count("![") == 1 and "![DP-MicroAdam by density at a fixed learning rate, ε = 8](density.png)" in text
    assert text.index("](density.png)") < text.index("## Window")


def test_what_cannot_be_done_is_one_sentence(capsys):
    assert main(["table", "nothing"]) == 1 and capsys.readouterr().err.startswith(
        "there is no table nothing: choose one of ab"
    )
    assert main(["table", "deit"]) == 1
    assert "not at size cpu, a DeiT is not fine-tuned on two cores; it has smoke, full" in capsys.readouterr().err


def test_commands_and_plans_are_printed(capsys, nothing_run):
    assert main(["table", "augmult", "--size", "smoke", "--commands"]) == 0
    assert (
        capsys.readouterr().out.count(
            "run.py -m randomness=research ema=0.999 size=smoke privacy=eps8 seed=0 optimizer="
        )
        == 1
    )
    assert main(["table", "augmult", "--size", "smoke", "--plan"]) == 0
    assert "augmult, size smoke: 2 runs, 0 of them finished · about" in capsys.readouterr().out


def test_make_runs_tables_through_the_command():
    done = subprocess.run(
        ["make", "-n", "table-digits", "SIZE=cpu", "JOBS=3"], cwd=ROOT, capture_output=True, text=True
    )
    assert "dpopt table --size cpu --run --jobs 3 digits" in done.stdout, done.stdout + done.stderr


def test_make_says_the_new_word_for_an_old_one():
    done = subprocess.run(["make", "-n", "tables", "SCALE=cpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "SCALE is now SIZE: make tables SIZE=cpu." in done.stderr
