"""One HTML page of finished runs: groups compared, their curves, and each run's privacy card and configuration."""

import math
from collections.abc import Sequence
from html import escape

import yaml
from matplotlib.ticker import MaxNLocator

from dpopt import files
from dpopt.runs.comparison import COLORS, FinishedRun, Group, curve, group_runs, show, summarize, table
from dpopt.runs.directory import CARD
from dpopt.runs.markdown import to_html
from dpopt.runs.report_page import page

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 520, 300, 46, 18, 10, 38
_DASHES = ("", "6 3", "2 3", "6 3 2 3")

Curve = list[tuple[int, float, float]]  # step, mean, standard deviation


def report(runs: Sequence[FinishedRun], measure: str) -> str:
    """Write the page.

    Raises:
        ValueError: when runs cannot be compared, or lack the measure.
    """
    groups = group_runs(runs)
    count = f"{len(runs)} run{'s' * (len(runs) > 1)} in {len(groups)} group{'s' * (len(groups) > 1)}"
    parts = [
        "<h1>Runs compared</h1>",
        f'<p class="note">{count}. Runs of a group differ only in their seed.</p>',
        *([_WARNING] if measure.startswith("private/") else []),
        "<h2>Groups</h2>",
        _groups(groups, measure),
        '<p class="note">Mean ± standard deviation over seeds. Intervals are Student’s, at 95%, from three seeds on. '
        "Differences are paired by seed.</p>",
        "<h2>Curves</h2>",
        _figure(groups, measure),
        "<h2>Runs</h2>",
        *(_run(run, measure) for group in groups for run in group.runs),
    ]
    return page("Runs compared", "\n".join(parts))


_WARNING = (
    '<p class="warning">What is named <code>private/…</code> are raw statistics of the training data, outside ε: '
    "do not publish this page.</p>"
)


def _groups(groups: Sequence[Group], measure: str) -> str:
    head, lines = table(summarize(groups, measure), measure)
    titles = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    rows = [
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f'<td data-head="{escape(n)}">{escape(text)}</td>' for n, text in zip(head[1:], rest, strict=True))
        + "</tr>"
        for first, *rest in lines
    ]
    return f'<table class="groups">\n<thead><tr>{titles}</tr></thead>\n<tbody>\n{chr(10).join(rows)}\n</tbody></table>'


def _figure(groups: Sequence[Group], measure: str) -> str:
    """Draw the curves, with a legend that shows the values at the pointer."""
    try:
        curves = [curve(group, measure) for group in groups]
    except ValueError as error:
        return f'<p class="note">No curves: {escape(str(error))}.</p>'
    finite = [[point for point in points if math.isfinite(point[1])] for points in curves]
    if not any(finite):
        return '<p class="note">No curves: all values are infinite or not a number.</p>'
    axes = _Axes(finite)
    lines = [line for number, points in enumerate(finite) for line in _curve(axes, points, number)]
    label = escape(f"{measure}{' in %' if 'accuracy' in measure else ''}")
    steps = sorted({step for points in finite for step, _, _ in points})
    at = [{step: _told(mean, sd) for step, mean, sd in points} for points in finite]
    data = {
        "width": _WIDTH,
        "steps": steps,
        "x": [round(axes.x(step), 1) for step in steps],
        "values": [[told.get(step, "–") for step in steps] for told in at],
    }
    legend = [
        f'<li><i style="background:{COLORS[number % len(COLORS)]}"></i>{escape(_legend(group))} <b></b></li>'
        for number, group in enumerate(groups)
    ]
    return "\n".join(
        [
            f'<figure>\n<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label} against step">',
            *axes.drawn(),
            *lines,
            f'<line id="at" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" x1="0" x2="0" stroke="#57606a" visibility="hidden"/>',
            "</svg>",
            f'<figcaption class="note">{label} against step. <span id="step">Point at the curves for values.</span>'
            "</figcaption>",
            f'<ul class="legend">\n{chr(10).join(legend)}\n</ul>\n</figure>',
            f'<script type="application/json" id="curves">{_script_json(data)}</script>',
        ]
    )


def _legend(group: Group) -> str:
    count = len(group.runs)
    return f"{group.label} ({f'mean ± sd of {count} seeds' if count > 1 else 'one run'})"


def _told(mean: float, sd: float) -> str:
    return f"{mean:.4g}" + (f" ± {sd:.2g}" if math.isfinite(sd) else "")


def _script_json(data: object) -> str:
    """Write JSON that cannot end the script element it stands in."""
    return files.to_json(data).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


class _Axes:
    """The scales of the figure, and their ticks."""

    def __init__(self, curves: Sequence[Curve]) -> None:
        points = [point for one in curves for point in one]
        around = [(mean, sd if math.isfinite(sd) else 0.0) for _, mean, sd in points]
        last = max(step for step, _, _ in points)
        low, high = min(mean - sd for mean, sd in around), max(mean + sd for mean, sd in around)
        margin = 0.04 * (high - low) or abs(high) * 0.1 or 1.0
        self.last, self.low, self.high = max(last, 1), low - margin, high + margin

    def x(self, step: float) -> float:
        """Place a step."""
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / self.last

    def y(self, value: float) -> float:
        """Place a value."""
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (self.high - value) / (self.high - self.low)

    def drawn(self) -> list[str]:
        """Draw grid, ticks and their labels."""
        right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        found = []
        for value in MaxNLocator(5).tick_values(self.low, self.high):
            if self.low <= value <= self.high:
                y = f"{self.y(value):.1f}"
                found.append(f'<line x1="{_LEFT}" x2="{right}" y1="{y}" y2="{y}" stroke="#e5e5e5"/>')
                found.append(f'<text x="{_LEFT - 6}" y="{y}" dy="4" text-anchor="end">{value:.4g}</text>')
        for step in MaxNLocator(5, integer=True).tick_values(0, self.last):
            if 0 <= step <= self.last:
                found.append(f'<text x="{self.x(step):.1f}" y="{bottom + 15}" text-anchor="middle">{step:,.0f}</text>')
        found.append(f'<line x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}" stroke="#57606a"/>')
        found.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 5}" text-anchor="middle">step</text>')
        return found


def _curve(axes: _Axes, points: Curve, number: int) -> list[str]:
    """Draw a line, its points, and the band of one standard deviation."""
    color, dash = COLORS[number % len(COLORS)], _DASHES[number // len(COLORS) % len(_DASHES)]
    along = [(axes.x(step), axes.y(mean)) for step, mean, _ in points]
    found = []
    if points and all(math.isfinite(sd) for _, _, sd in points):
        upper = [(axes.x(step), axes.y(mean + sd)) for step, mean, sd in points]
        lower = [(axes.x(step), axes.y(mean - sd)) for step, mean, sd in reversed(points)]
        found.append(f'<polygon points="{_path(upper + lower)}" fill="{color}" fill-opacity="0.14"/>')
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    found.append(f'<polyline points="{_path(along)}" fill="none" stroke="{color}" stroke-width="1.6"{dashes}/>')
    few = along if len(along) <= 40 else []
    return found + [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{color}"/>' for x, y in few]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _run(run: FinishedRun, measure: str) -> str:
    """Write a run's privacy card and configuration, folded."""
    score = show(measure, run.score(measure))
    told = f"{score:.2f}{'%' if 'accuracy' in measure else ''}, ε = {run.score('epsilon'):.3g}".replace("inf", "∞")
    path = run.directory / CARD
    card = to_html(path.read_text(errors="replace")) if path.exists() else f'<p class="note">There is no {CARD}.</p>'
    config = yaml.safe_dump(run.result["config"], sort_keys=False, allow_unicode=True)
    return (
        f"<details>\n<summary>{escape(run.directory.name)} <span>{escape(told)}</span></summary>\n{card}\n"
        f"<details>\n<summary>Configuration</summary>\n<pre>{escape(config)}</pre>\n</details>\n</details>"
    )
