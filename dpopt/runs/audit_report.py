"""The audit of a run, for people: audit.json, the ROC figure, the section of the privacy card, the table on screen."""

import math
import shutil
import textwrap
from pathlib import Path

import numpy as np
from scipy.special import ndtr, ndtri

from dpopt import files
from dpopt.privacy.audit import BOUNDS, AuditResult, gdp_mu_of
from dpopt.runs.directory import AUDIT, ROC

_LOWER = "A bound is a lower bound: it can refute the claim, and never proves it."
_COLORS = {"canaries": "#0072B2", "claim": "#D55E00", "gaussian": "#009E73"}


def write_audit(directory: Path, result: AuditResult, scores: np.ndarray, included: np.ndarray) -> None:
    """Write audit.json and audit.png into a run directory."""
    files.write_json(directory / AUDIT, result.to_json())
    temporary = directory / f".{ROC}.tmp"
    roc_figure(temporary, result, {"canaries": (scores, included)})
    files.replace_durably(temporary, directory / ROC)


def read_audit(directory: Path) -> AuditResult | None:
    """Read the audit of a run; None where there is none."""
    values = files.read_json(directory / AUDIT)
    return AuditResult.from_json(values) if values else None


def card_section(result: AuditResult) -> list[str]:
    """Write the section of the privacy card, as lines of Markdown."""
    rows = [
        f"| {name} | {bound:.2f} | {result.ceilings[name]:.2f} | {BOUNDS[name][1]} |"
        for name, bound in result.bounds.items()
    ]
    checks = [f"- {'holds' if held else '**fails**'}: {name}" for name, held in result.checks.items()]
    head = ["| bound | ε is at least | ideal audit | assumes fair coins and |", "|---|---|---|---|"]
    return ["## Audit", "", _about(result), "", *head, *rows, "", verdict(result), _LOWER, "", *checks]


def audit_table(result: AuditResult, name: str) -> str:
    """Write the audit as a table, as wide as the terminal, 100 columns elsewhere."""
    lines = [f"audit of {name}", _about(result), ""]
    width = max(40, shutil.get_terminal_size((100, 24)).columns - 24)
    lines += ["bound    ε ≥    ideal  assumes fair coins and"]
    for bound, epsilon in result.bounds.items():
        first, *more = textwrap.wrap(BOUNDS[bound][1], width)
        lines.append(f"{bound:8} {epsilon:<6.2f} {result.ceilings[bound]:<6.2f} {first}")
        lines += [f"{'':22} {line}" for line in more]
    lines += ["", *(f"{'holds' if held else 'FAILS'}: {check}" for check, held in result.checks.items())]
    return "\n".join([*lines, "", f"{verdict(result)} {_LOWER}"])


def verdict(result: AuditResult) -> str:
    """Say in a sentence whether the claim stands."""
    claim = f"ε = {result.epsilon:.4g} at δ = {result.delta:g}"
    if not result.refuted_by:
        return f"The claim of {claim} is not refuted."
    return f"The claim of {claim} is refuted: {'; '.join(result.refuted_by)}."


def _about(result: AuditResult) -> str:
    signal = ""
    if result.signal != 1:
        signal = (
            f" A canary lies in one of {result.signal**-2:.0f} layers, so its gradient is clipped to "
            f"{result.signal:.3g} of the sensitivity: the ideal audit shows how little of the budget it can see."
        )
    return (
        f"{result.canaries:,} canaries, of which {result.included:,} belonged to the data, at {1 - result.alpha:.0%} "
        f"confidence for each bound. The ideal audit is a simulation of the claimed mechanism.{signal}"
    )


def roc_figure(path: Path, result: AuditResult, audits: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Draw true against false positive rate, logarithmic, with the trade-off curves of the claim.

    Args:
        path: of the PNG.
        result: states the claim.
        audits: scores (m,) and coins (m,), by label.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 4.6), layout="constrained")
    axis = figure.subplots()
    colors = [_COLORS["canaries"], "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000"]
    for number, (label, (scores, included)) in enumerate(audits.items()):
        false, true = _rates(scores, included)
        axis.step(false, true, where="post", color=colors[number % 6], label=label, linewidth=1.4)
    rate = np.geomspace(1e-5, 1, 400)
    if math.isfinite(result.epsilon):
        most = np.minimum(
            np.exp(min(result.epsilon, 700)) * rate + result.delta,
            1 - np.exp(-result.epsilon) * (1 - result.delta - rate).clip(0),
        )
        told = f"({result.epsilon:.3g}, {result.delta:g})"
        axis.plot(rate, most.clip(max=1), "--", color=_COLORS["claim"], label=f"limit of the claim {told}")
        mu = gdp_mu_of(result.epsilon, result.delta)
        curve = ndtr(ndtri(rate) + mu)
        axis.plot(rate, curve, color=_COLORS["gaussian"], label=f"Gaussian with that claim, μ = {mu:.3g}", linewidth=1)
    axis.plot(rate, rate, ":", color="#999999", label="guessing")
    lowest = 0.5 / result.canaries
    axis.set(xscale="log", yscale="log", xlim=(lowest, 1.05), ylim=(lowest, 1.3))
    axis.set(xlabel="false positive rate", ylabel="true positive rate")
    axis.set_title(f"{result.canaries:,} canaries", fontsize=10)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2, frameon=False)  # off the lines
    figure.savefig(path, dpi=150, format="png")


def _rates(scores: np.ndarray, included: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute false and true positive rates, from the highest threshold down."""
    by_score = included[np.argsort(-scores, kind="stable")]
    return np.cumsum(~by_score) / max((~included).sum(), 1), np.cumsum(by_score) / max(included.sum(), 1)
