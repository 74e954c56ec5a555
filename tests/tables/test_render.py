"""Pages: what a cell shows, what is compared, and what is said of what is missing."""

import math
from dataclasses import replace

import pytest
from helpers import fake_jobs, finish_run

from dpopt.runs.comparison import bound
from dpopt.tables import render, spec
from dpopt.training.run import note_failure


def test_a_published_figure_is_compared_only_where_the_setting_is_the_same():
    about = spec.read("cifar10")
    entry = about["tables"][0]
    one, *_ = entry["published"]
    assert (one["row"], one["column"], one["value"], one["train_size"]) == ("dp_microadam", "eps8", 71.4, 45_000)
    for size, expected in (("full", True), ("cpu", False)):
        words = spec.words_of(about, entry, entry["rows"][0], size)
        jobs = spec.expand(spec.merge(*words, "optimizer=dp_microadam", "privacy=eps8", "seed=0"), label="ours")
        assert len(jobs) == 1 and render.agrees(one, jobs) is expected
        if expected:
            for change in ({"epsilon": 3}, {"delta": 1e-6}, {"train_size": 50_000}, {"model": "wrn_40_4"}):
                assert not render.agrees(one | change, jobs)


def test_cells_say_what_is_missing(tmp_path):
    found = fake_jobs(tmp_path)
    scores = {("dp_sgd", "eps1"): (0.5, 0.6, 0.55), ("dp_sgd", "eps8"): (0.7, 0.7, None)}
    for job in found:
        score = scores.get((job.row, job.column), (None,) * 3)[job.config.seed]
        if score is not None:
            finish_run(job, test_accuracy=score)
        elif (job.row, job.column) == ("dp_psasc_momentum", "eps8"):
            note_failure(job.config, ValueError("the data set is not there\nor damaged"))
    rows, columns, cells = render.arrange(found)
    with pytest.raises(ValueError, match="two runs are row dp_sgd, eps1, seed 0: give a row a label"):
        render.arrange([*found, found[0]])
    assert rows == ["dp_sgd", "dp_psasc_momentum"] and columns == ["eps1", "eps8"]
    numbers = [replace(found[0], row=row) for row in ("0.3", "10", "1e-3")]
    assert render.arrange(numbers)[0] == ["1e-3", "0.3", "10"]
    shown = {at: render.cell(jobs, "test_accuracy") for at, jobs in cells.items()}
    assert shown == {
        ("dp_sgd", "eps1"): "55.0 ± 5.0 (n = 3)",
        ("dp_sgd", "eps8"): "70.0 ± 0.0 (n = 2)",
        ("dp_psasc_momentum", "eps1"): "not run",
        ("dp_psasc_momentum", "eps8"): "failed: the data set is not there",
    }


def test_conclusions_wait_for_all_runs_of_their_size(tmp_path, monkeypatch):
    runs = f"experiment=quickstart optimizer=dp_sgd,dp_psasc_momentum seed=0 privacy=eps8 output_dir={tmp_path}"
    part = {"title": "Accuracy", "runs": runs, "conclusions": {"full": "Nothing differs."}}
    about = {"title": "Mine", "setting": "Digits.", "sizes": {"cpu": None, "full": None}, "tables": [part]}
    monkeypatch.setattr(spec, "read", lambda name: about)
    for job in spec.jobs(about, part, "full"):
        assert "Nothing differs." not in render.page("mine", "full")[0]
        finish_run(job, test_accuracy=0.5, wall_seconds=1, git_commit="c0ffee", device="cpu")
    assert "Nothing differs." in render.page("mine", "full")[0]
    part["conclusions"] = {"cpu": "Nothing differs."}
    assert "Nothing differs." not in render.page("mine", "full")[0]


def test_a_loss_that_is_not_finite_is_a_cell_like_any_other(tmp_path):
    found = [job for job in fake_jobs(tmp_path) if (job.row, job.column) == ("dp_sgd", "eps1")]
    for job in found:
        finish_run(job, test_loss=float("nan") if job.config.seed else 1.0)
    assert render.cell(found, "test_loss") == "diverged (2 of 3)"
    assert difference(found, found, "test_loss") == "" and render.cell(found, "no such") == "not run"


def difference(jobs, base, measure):
    return render.difference(render.pairs(jobs, base, measure), len(jobs), measure)


def test_a_star_holds_for_all_differences_together(tmp_path):
    """By hand: t = 3.46 and 34.6 with 2 degrees of freedom are p = .074 and .00083, of which the smaller is < .05/2."""
    found = fake_jobs(tmp_path)
    for job in found:
        step = 0.01 if job.column == "eps1" else 0.001
        gain = 0.02 + step * (job.config.seed - 1) if job.row == "dp_psasc_momentum" else 0.0
        finish_run(job, test_accuracy=0.5 + gain)
    _, _, cells = render.arrange(found)
    text = render.differences("dp_sgd", {"eps1": "ε = 1", "eps8": "ε = 8"}, cells, "test_accuracy")
    assert "with 95% intervals; of these 2, * holds for all together (Holm)." in text
    assert "| `dp_psasc_momentum` | +2.0 [-0.5, +4.5] | +2.0 [+1.8, +2.2]* |" in text
    assert render.differences("dp_sgd", {"eps1": "ε = 1", "eps8": "ε = 8"}, cells, "no such") == ""


def test_differences_are_paired_by_seed(tmp_path):
    """By hand: differences 1, 2, 3 points: mean 2, sd 1, t(.975, 2) = 4.303, half = 4.303/√3."""
    found = fake_jobs(tmp_path)
    for job in found:
        gain = 0.01 * (job.config.seed + 1) if job.row == "dp_psasc_momentum" else 0.0
        finish_run(job, test_accuracy=0.5 + 0.1 * job.config.seed + gain)
    _, _, cells = render.arrange(found)
    one, other = cells["dp_psasc_momentum", "eps8"], cells["dp_sgd", "eps8"]
    assert difference(one, other, "test_accuracy") == "+2.0 [-0.5, +4.5]"
    assert 4.3027 / math.sqrt(3) == pytest.approx(2.484, abs=1e-3)
    assert difference(one[:2], other, "test_accuracy") == "+1.5 (n = 2: no interval)"
    assert difference(one, other[2:], "test_accuracy") == "+3.0 (n = 1: no interval)"
    fourth = replace(one[0], config=replace(one[0].config, seed=3))  # without a partner
    assert difference([*one, fourth], other, "test_accuracy") == "+2.0 [-0.5, +4.5] (n = 3)"
    assert [bound(value, 1) for value in (-0.009, 0.04, 0.0, -1.25)] == ["-0.01", "+0.04", "+0.0", "-1.2"]


def test_the_best_row_is_chosen_on_average_or_by_column(tmp_path):
    found = fake_jobs(tmp_path, "0")
    scores = {("dp_sgd", "eps1"): 0.4, ("dp_sgd", "eps8"): 0.9, ("dp_psasc_momentum", "eps1"): 0.6}
    for job in found:
        if (job.row, job.column) in scores:
            finish_run(job, test_accuracy=scores[job.row, job.column])
    rows, columns, cells = render.arrange(found)
    assert render.chosen(rows, columns, cells, "test_accuracy", "average") == "Not decided: runs are missing."
    finish_run(cells["dp_psasc_momentum", "eps8"][0], test_accuracy=0.65)
    assert render.chosen(rows, columns, cells, "test_accuracy", "average") == "Best on average: dp_sgd."
    each = render.chosen(rows, columns, cells, "test_accuracy", "each")
    assert each == "Best: dp_psasc_momentum at ε = 1, dp_sgd at ε = 8."


def test_delta_above_one_over_n_is_flagged():
    about = spec.read("imagenet")
    flagged = {}
    for entry in about["tables"]:
        _, _, cells = render.arrange(spec.jobs(about, entry, "full"))
        flagged[entry["title"]] = render.flag_delta(cells)
    assert ["above 1/N" in text for text in flagged["Private, ResNet-50"]] == [True]
    assert not flagged["Without privacy, ResNet-18"]
