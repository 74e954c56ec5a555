"""`dpopt table`: pages and figures are written, and not over fuller ones; commands and plans are printed."""

import csv
import subprocess

import pytest
from helpers import ROOT

from dpopt.cli import main
from dpopt.tables import figures, render

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
