"""Figures are drawn of what there is."""

import csv
import math

import pytest
from helpers import fake_jobs, finish_run

from dpopt.runs import directory as run_files
from dpopt.tables import figures, render


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
    assert render.interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.484), abs=1e-3)
    assert math.isnan(render.interval([1.0, 2.0])[1])
    figures.plt.close("all")
