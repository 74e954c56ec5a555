"""The privacy card: what ε means here, what it does not cover, and all that is needed to check it.

The card stands alone, as Markdown and as one HTML file: whoever has it needs neither the run nor dpopt.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dpopt import files
from dpopt.data.datasets import UNIT
from dpopt.privacy.accounting import distinguishing_advantage, pld_grid, recipe
from dpopt.privacy.audit import AuditResult
from dpopt.privacy.guessing import correct_guesses, found_members
from dpopt.privacy.mechanisms import INDEPENDENT
from dpopt.privacy.noise import NOISE_VERSION
from dpopt.privacy.plan import PrivacyPlan
from dpopt.runs.audit_report import card_section
from dpopt.runs.description import RunDescription
from dpopt.runs.directory import CARD, CARD_PAGE
from dpopt.runs.markdown import code, plain, to_html
from dpopt.runs.report_page import page
from dpopt.runs.result import REPRODUCIBLE

_UNACCOUNTED = """\
- the choice of hyper-parameters: every other run on the same data spends privacy, too;
- any use of the test set: ε protects training examples, and metrics on the test set are exact;
- side channels: running time (`time/…`, two digits of which are recorded), memory, and the rounding of sums in
  floating point (the noise itself is released on a grid that hides its own)."""

_KEPT = "; until then the key lies in `secret.key`, and whoever has it can remove the noise: never publish that file"
_UNPROTECTED = "Nothing is protected: the model and every recorded number may reveal training examples."


def guarantee(about: RunDescription, plan: PrivacyPlan, steps: int) -> str:
    """State in a sentence what a run may claim after so many steps."""
    if not about.private:
        return "none: no clipping, no noise"
    spent = plan.epsilon_at(steps)
    if math.isinf(spent):
        return "none: clipping without noise"
    claim = f"({spent:.4g}, {plan.delta:g})-differential privacy"
    return claim if about.secret else f"{REPRODUCIBLE}; against all others {claim}"


@dataclass(frozen=True)
class CardFacts:
    """What the plan does not know.

    Attributes:
        unit: what is protected.
        public: what the training takes as public, by name: initial weights, constants of the preprocessing.
        origin: where the model is from, as rows of Markdown by name (`dpopt.runs.origin`).
    """

    unit: str = UNIT
    public: Mapping[str, str] = field(default_factory=dict)
    origin: Mapping[str, str] = field(default_factory=dict)


def write_card(directory: Path, text: str, name: str) -> None:
    """Write a card's Markdown, and its HTML, which loads nothing."""
    files.write_atomic(directory / CARD, text)
    files.write_atomic(directory / CARD_PAGE, page(f"Privacy card: {name}", to_html(text, level=1), script=""))


def privacy_card(
    about: RunDescription,
    plan: PrivacyPlan,
    sensitivity: float | None,
    steps: int | None,
    diagnostics: bool,
    facts: CardFacts | None = None,
    audit: AuditResult | None = None,
) -> str:
    """Write the card, as Markdown.

    Args:
        about: names and settings of the run.
        plan: its plan.
        sensitivity: what the clip rule guarantees; None for a run without clipping.
        steps: steps taken; None while the run goes on.
        diagnostics: whether raw statistics of the training data were recorded at any time of the run.
        facts: unit, what is public, and where the model is from.
        audit: of the finished run, if it was audited.
    """
    facts = facts or CardFacts()
    taken = plan.steps if steps is None else steps  # the most that may have been released while it goes on
    protected = about.private and not math.isinf(plan.epsilon_at(taken))
    lines = [f"# Privacy card: {plain(about.name)}", "", *_claim(about, plan, sensitivity, steps)]
    if protected:
        rows = _rows(about, plan, sensitivity, taken, facts.unit)
        rows |= {f"{name} (public)": plain(text) for name, text in facts.public.items()}
        lines += ["", "## In plain words", "", *_plain_words(plan, taken), "", "## The guarantee", "", *_table(rows)]
        lines += ["", "## Recompute ε", "", *_recipe(plan, taken)]
    lines += ["", "## Origin", "", *_table(facts.origin)] if facts.origin else []
    lines += ["", *card_section(audit)] if audit is not None else []
    lines += ["", "## Not accounted", "", _UNACCOUNTED] if protected else ["", _UNPROTECTED]
    lines += _outside(about, diagnostics) if protected else []
    return "\n".join(lines) + "\n"


def _outside(about: RunDescription, diagnostics: bool) -> list[str]:
    """List what this training in particular leaves outside ε."""
    lines = []
    if about.own_loop:
        lines += [
            "- whatever the training loop does with the data past `PrivateGradient`: constants computed from them, a "
            "printed loss, a choice of records. dpopt did not see it."
        ]
    if diagnostics:
        named = "named `private/…`** in metrics.csv, result.json and the tracker"
        named = "in `PrivateGradient.statistics`**" if about.own_loop else named
        lines += [
            f"- **all that is {named}: raw statistics of the "
            "training data (training loss, clipped fraction, signal-to-noise, realized batch size, accuracy on "
            "held-out training data), recorded because `diagnostics=true`. Do not publish them.",
        ]
    elif about.holdout:
        lines += ["- held-out training examples were not trained on; no metric on them was recorded."]
    return lines


def _claim(about: RunDescription, plan: PrivacyPlan, sensitivity: float | None, steps: int | None) -> list[str]:
    """State the claim, or that there is none."""
    taken = plan.steps if steps is None else steps
    when = f"{taken:,} of {plan.steps:,} planned steps"
    when = f"after {when}" if steps is not None else f"at the most, after {when}: the run is in progress, or was killed"
    if not about.private:
        return ["**This run is not private.** No clipping, no noise (`privacy=none`): the non-private control."]
    if math.isinf(plan.epsilon_at(taken)):
        return [
            "**This run is not private.** Gradients were clipped, but no noise was added: ε = ∞.",
            "",
            f"Clip rule: {plain(about.clip_target)}, sensitivity {sensitivity:g}{_moving(about, plan)}.",
        ]
    seeded = "`seed=`" if about.own_loop else "`randomness=research`"
    withheld = [f"**No claim: {REPRODUCIBLE}** ({seeded}). Against all others:", ""]
    covered = "that follows from `p.grad`" if about.own_loop else "logged outside `private/` and `time/`"
    return [
        *([] if about.secret else withheld),
        f"**(ε = {plan.epsilon_at(taken):.4g}, δ = {plan.delta:g})**-differential privacy for the model and for "
        f"everything {covered}, {when}.",
    ]


def _plain_words(plan: PrivacyPlan, taken: int) -> list[str]:
    """Say what a guesser gains (`dpopt.privacy.guessing`); numbers are rounded up."""
    epsilon, delta = plan.epsilon_at(taken), plan.delta
    guesses = _of_hundred(correct_guesses(epsilon, delta))
    tighter = _of_hundred((1 + distinguishing_advantage(plan.releases(taken))) / 2)
    found = _of_hundred(found_members(epsilon, delta, 0.01))
    factor = 2 * math.exp(min(epsilon, 700)) * 1.0005  # four digits never round it down
    return [
        "Somebody knows the method and every record but one, and guesses whether that one was in the data. A fair "
        "coin decided it, so without the model they are right 50 times in 100.",
        "",
        f"- With the model they are right at most **{guesses} times in 100**, whatever they do: (e^ε + δ)/(1 + e^ε). "
        f"By its whole loss distribution, of which (ε, δ) is one point, it is at most {tighter}.",
        f"- If they accuse 1 of 100 absent records, they find at most {found} of 100 present ones: e^ε · 1% + δ, or "
        "1 − e^(−ε) · (99% − δ) where that is less.",
        f"- What they see multiplies the odds that the record was there by 2e^ε = {factor:.4g} or more with a chance "
        f"of 2δ = {2 * delta:g} at most.",
    ]


def _of_hundred(share: float) -> str:
    return f"{min(100.0, math.ceil(share * 10_000 - 1e-6) / 100):g}"


def _recipe(plan: PrivacyPlan, taken: int) -> list[str]:
    """Write the code that recomputes ε without dpopt."""
    if not taken:
        return [
            f"No step was taken: ε = {plan.epsilon_at(0):.4g}{', of the statistics' * bool(plan.statistics_noise)}."
        ]
    library = "dp-accounting" if plan.accountant == "pld" else "opacus"
    noise, rate, count = plan.composed(taken)
    drawn, of = (plan.batch_size, plan.dataset_size) if plan.mechanism == INDEPENDENT else (rate, 1)
    lines = recipe(noise, drawn, of, count, plan.delta, plan.accountant, plan.statistics_noise)
    return [
        f"With `pip install {library}`, this prints ε = {plan.epsilon_at(taken):.6g}:",
        "",
        "```python",
        lines,
        "```",
        "",
        "It holds if each step draws its batch, clips and adds its noise as the table says. In the code of the commit "
        "below, `tests/invariants/` checks each of these against wrong versions of it.",
    ]


def _table(rows: Mapping[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())]


def _rows(about: RunDescription, plan: PrivacyPlan, sensitivity: float | None, taken: int, unit: str) -> dict[str, str]:
    """List what the guarantee rests on, by name."""
    against = plan.delta * plan.dataset_size
    warning = "" if against < 1 else " — **δ is not below 1/N: it permits publishing an example outright**"
    by = {plan.accountant: plan.epsilon_at(taken), **plan.epsilon_by_others(taken)}
    by_others = ", ".join(f"by {name} {epsilon:.4g}" for name, epsilon in by.items())
    grid = (
        f", losses on a grid of {pld_grid(plan.composed(taken)[0], plan.statistics_noise):g}"
        if plan.accountant == "pld"
        else ""
    )
    return {
        "method": _method(about),
        "privacy unit": plain(unit),
        "neighboring datasets": f"one {'client' if unit.startswith('one client') else 'example'} added or removed",
        "N": f"{plan.dataset_size:,}, taken as public",
        "δ against 1/N": f"{plan.delta:g} = {against:.2g} · 1/N{warning}",
        "steps T": f"{taken:,} noisy releases, each of a new batch",
        "sampler": f"{plan.sampling} (expected batch {plan.batch_size:,})",
        "mechanism": _mechanism(about, plan, taken),
        "clip rule": f"{plain(about.clip_target)}, sensitivity {sensitivity:g}{_moving(about, plan)}",
        "noise multiplier σ": f"{plan.noise_multiplier:.6g}{_shares(plan)}",
        **_statistics(plan),
        "accountant": f"{plan.accountant}{grid}; {by_others}",
        "randomness": _randomness(about, taken < plan.steps),
    }


def _mechanism(about: RunDescription, plan: PrivacyPlan, taken: int) -> str:
    grid = f"released on a grid of about σS/4096 (noise version {NOISE_VERSION})"
    if plan.mechanism == INDEPENDENT:
        return f"Gaussian, {grid}"
    noise, rate, count = plan.composed(taken)
    return (
        f"Gaussian, correlated over steps by {about.mechanism_call}, {grid}; accounted as {count:,} Gaussians of noise "
        f"multiplier {noise:.6g}, sampled at rate {rate:.6g}"
    )


def _method(about: RunDescription) -> str:
    parts = [code(name) for name in (about.optimizer, *about.others)]
    parts += [f"a weight average of {about.ema:g}"] if about.ema is not None else []
    return f"{', '.join(parts)}, training {code(about.model)} on {code(about.dataset)}"


def _moving(about: RunDescription, plan: PrivacyPlan) -> str:
    when = " at the end, moved" if about.own_loop else " at first, then moved"
    by = (
        "a count"
        if plan.count_noise
        else "what it releases with the gradients"
        if about.clip.lower() == "slack"
        else ""
    )
    return f"{when} at every step by {by}" if by else ""


def _statistics(plan: PrivacyPlan) -> dict[str, str]:
    if not plan.statistics_noise:
        return {}
    return {
        "statistics of channels": "means and mean squares, released once of all training examples before the first "
        f"step, sensitivity √2, noise multiplier {plan.statistics_noise:.6g}; in ε"
    }


def _shares(plan: PrivacyPlan) -> str:
    if not plan.count_noise:
        return ""
    return (
        f" for both releases of a step together: {plan.gradient_noise_multiplier:.6g} on the clipped gradients, and "
        f"{2 * plan.count_noise:.6g} on the count of unclipped examples (noise ± {plan.count_noise:g}, sensitivity ½)"
    )


def _randomness(about: RunDescription, unfinished: bool) -> str:
    """Say where the draws come from, and who could repeat them."""
    if about.secret:
        kept = "erased at the end" + (_KEPT if unfinished else "")
        kept = "kept in memory alone" if about.own_loop else kept
        return f"secret: 256 bits from the operating system, expanded by ChaCha20, {kept}"
    seed = "a seed" if about.seed is None else f"seed {about.seed}"
    fix = "under a plan without `seed=`" if about.own_loop else "from a run with `randomness=secret`"
    return (
        f"research: expanded from {seed} by ChaCha20. Whoever knows the seed and this configuration can "
        f"recompute sampling and noise; release a model only {fix}"
    )
