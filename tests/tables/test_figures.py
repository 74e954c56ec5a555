"""Figures are drawn of what there is."""

import ast
import csv
import math
import re
from collections import Counter

import pytest
from helpers import CONF, ROOT, configure, fake_jobs, finish_run
from matplotlib.colors import to_hex

from dpopt.config.components import component_name
from dpopt.runs import directory as run_files
from dpopt.runs.comparison import interval
from dpopt.tables import figures, spec

OPTIMIZERS = sorted((CONF / "optimizer").glob("*.yaml"))


def test_figures_are_drawn_of_what_there_is(tmp_path):
    axis = figures.plt.subplots()[1]
    found = fake_jobs(tmp_path)
    assert not figures.by_epsilon(axis, found, {})
    for job in found:
        finish_run(job, test_accuracy=0.5 + 0.01 * job.config.seed, optimizer_state_bytes=80, trainable_parameters=10)
        lines = [["step", "test/accuracy", "privacy/epsilon"], *([s, 0.1 * s, s / 2] for s in range(1, 6))]
        with (job.directory() / run_files.METRICS).open("w", newline="") as file:
            csv.writer(file).writerows(lines)
    (found[-1].directory() / run_files.RESULT).unlink()  # interrupted: not in the curves
    with (found[-1].directory() / run_files.METRICS).open("a") as file:
        file.write("6,0.9,3\n")
    assert figures.by_epsilon(axis, found, {})
    one, other = (figures.plt.subplots()[1] for _ in range(2))
    assert figures.curves(one, found, {"column": "eps8"})
    assert [list(line.get_xdata()) for line in one.lines] == [[1, 2, 3, 4, 5]] * 2 and one.child_axes
    lines[1][-1] = 0.7  # another ε at the same step
    with (found[0].directory() / run_files.METRICS).open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    assert figures.curves(other, found, {"column": found[0].column}) and not other.child_axes
    assert figures.bars(axis, found, {})
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.484), abs=1e-3)
    assert math.isnan(interval([1.0, 2.0])[1])
    figures.plt.close("all")


def finished_table(tmp_path, seeds):
    found = fake_jobs(tmp_path, seeds)
    for job in found:
        finish_run(job, test_accuracy=0.5 + 0.01 * job.config.seed, optimizer_state_bytes=80, trainable_parameters=10)
        lines = [["step", "test/accuracy", "privacy/epsilon"], *([s, 0.1 * s, s / 2] for s in range(1, 6))]
        with (job.directory() / run_files.METRICS).open("w", newline="") as file:
            csv.writer(file).writerows(lines)
    return found


def colors(kind, jobs, about):
    """The color of every method, by name."""
    axis = figures.plt.subplots()[1]
    assert kind(axis, jobs, about)
    if kind is figures.bars:
        names = [text.get_text() for text in axis.get_yticklabels()]
        return {name: to_hex(bar.get_facecolor()) for name, bar in zip(names, axis.patches, strict=True)}
    handles, labels = axis.get_legend_handles_labels()
    lines = [handle[0] if isinstance(handle, tuple) else handle for handle in handles]
    return {label: line.get_color().lower() for label, line in zip(labels, lines, strict=True)}


def test_a_method_has_one_color_in_every_figure(tmp_path):
    jobs = finished_table(tmp_path, "0,1,2")
    seen = [colors(figures.by_epsilon, some, {}) for some in (jobs, jobs[::-1])]
    for rows in (["dp_psasc_momentum"], ["dp_sgd"]):
        seen.append(colors(figures.curves, jobs, {"column": "eps8", "rows": rows}))
    seen += [colors(figures.bars, jobs, {})]
    merged = {name: {found[name] for found in seen if name in found} for name in ("dp_sgd", "dp_psasc_momentum")}
    assert all(len(found) == 1 for found in merged.values()) and merged["dp_sgd"] != merged["dp_psasc_momentum"]
    every = {path.stem: component_name(configure(f"optimizer={path.stem}").optimizer) for path in OPTIMIZERS}
    assert set(every.values()) == set(figures.STYLES)
    assert len({color for color, _ in figures.STYLES.values()}) == len(figures.STYLES)
    assert len({marker for _, marker in figures.STYLES.values()}) == len(figures.STYLES)
    drawn = Counter()
    lines = [figures.style(drawn, "microadam", label)["linestyle"] for label in "abc"]
    assert len(set(lines)) == 3
    figures.plt.close("all")


def test_intervals_are_named_where_they_are_drawn(tmp_path):
    for seeds, told in (("0,1,2", "mean and 95% interval over seeds"), ("3,4", "mean over seeds")):
        for kind, about in ((figures.by_epsilon, {}), (figures.curves, {"column": "eps8"})):
            axis = figures.plt.subplots()[1]
            assert kind(axis, finished_table(tmp_path, seeds), about)
            assert axis.get_ylabel() == f"test accuracy in %\n{told}"
    figures.plt.close("all")


def test_the_legend_lies_off_the_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "_mean_square_gradient", lambda make, steps, seed: 1 / steps)
    drawn = []
    monkeypatch.setattr(figures.plt, "close", drawn.append)
    assert figures.draw("convergence", "cpu", tmp_path)
    (image,) = drawn
    (legend,) = image.legends
    assert not legend.get_window_extent().overlaps(image.axes[0].get_window_extent())
    monkeypatch.undo()
    figures.plt.close("all")


@pytest.mark.parametrize("name", spec.names())
def test_a_figure_of_a_fixed_rate_says_so(name):
    for figure in spec.read(name).get("figures", []):
        assert "fixed learning rate" not in figure.get("table", "") or "fixed learning rate" in figure["title"]


def test_no_bar_lies_on_a_logarithmic_axis():
    """The length of a bar means nothing there."""
    for path in (*(ROOT / "dpopt").rglob("*.py"), *(ROOT / "scripts").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                text = ast.unparse(node)
                assert not (re.search(r"\.barh?\(", text) and re.search(r"scale(=|\()'log'", text)), (path, node.name)
