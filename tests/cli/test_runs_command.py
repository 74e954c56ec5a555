"""`dpopt runs`: list, compare and curves."""

import matplotlib.pyplot as plt
import pytest
from made_runs import make_run, make_three_groups

from dpopt.cli import runs
from dpopt.runs.comparison import find_runs, group_runs


def test_a_line_per_run(command, tmp_path):
    make_three_groups(tmp_path / "runs")
    done = command("runs", "list", "runs/*")
    assert done.returncode == 0 and done.stderr == ""
    lines = [line.split() for line in done.stdout.splitlines() if "-" in line]
    assert len(lines) == 7 and ["a-microadam-0", "90.00", "8", "40", "12"] in lines


def test_groups_are_compared_with_the_first_that_is_named(command, tmp_path):
    make_three_groups(tmp_path / "runs")
    make_run(tmp_path / "runs", "d", 0.3, 9, status="interrupted")
    done = command("runs", "compare", "runs/b*", "runs")
    assert done.returncode == 0 and done.stderr == "left out, because they are not finished: d\n"
    lines = [line for line in done.stdout.splitlines() if "optimizer=" in line]
    assert [line.split()[0] for line in lines] == ["optimizer=adam", "optimizer=microadam", "optimizer=sgd"]
    assert "-3.00 [-5.48, -0.52] (n = 3)" in lines[1] and lines[2].split()[-1] == "–"


def test_a_whole_line_stands_where_there_is_no_terminal(command, tmp_path):
    make_run(tmp_path, "a" * 190 + "[bold]", 0.9)
    assert "a" * 190 + "[bold]" in command("runs", "list", "a*").stdout


def test_curves_say_their_band(command, tmp_path, monkeypatch):
    make_three_groups(tmp_path / "runs")
    done = command("runs", "curves", "runs", "-o", "c.png")
    assert done.returncode == 0 and (tmp_path / "c.png").exists(), done.stderr
    monkeypatch.setattr(plt, "close", lambda figure: None)
    runs.draw(group_runs(find_runs(["runs"])[0]), "test_accuracy", tmp_path / "d.png")
    figure = plt.gcf()
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert told[0] == "optimizer=microadam (mean ± sd of 3 seeds)" and told[2] == "optimizer=sgd (one run)"
    axis = figure.axes[0]
    assert [list(line.get_ydata()) for line in axis.lines][2] == pytest.approx([30, 50])
    assert len(axis.collections) == 2  # no band around one run
    figure.clear()


@pytest.mark.parametrize(
    "words, meant",
    [
        ("list nothing*", "nothing* matches no finished run"),
        ("compare runs --measure perplexity", "holds no number perplexity"),
        ("curves runs -o no/c.png", "no/c.png cannot be written"),
    ],
)
def test_refusals_are_one_sentence(command, tmp_path, words, meant):
    make_run(tmp_path / "runs", "a", 0.9)
    done = command("runs", *words.split())
    assert done.returncode == 1 and meant in done.stderr and done.stderr.count("\n") == 1
