"""The privacy card of a run: what ε means here, and what it does not cover."""

import math
from collections.abc import Mapping

from dpopt.data.datasets import UNIT
from dpopt.privacy.audit import AuditResult
from dpopt.privacy.noise import NOISE_VERSION
from dpopt.privacy.plan import PrivacyPlan
from dpopt.runs.audit_report import card_section
from dpopt.runs.description import RunDescription
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


def privacy_card(
    about: RunDescription,
    plan: PrivacyPlan,
    sensitivity: float | None,
    steps: int | None,
    diagnostics: bool,
    public: Mapping[str, str] | None = None,
    audit: AuditResult | None = None,
    unit: str = UNIT,
) -> str:
    """Write the card, as Markdown.

    Args:
        about: names and settings of the run.
        plan: its plan.
        sensitivity: what the clip rule guarantees; None for a run without clipping.
        steps: steps taken; None while the run goes on.
        diagnostics: whether raw statistics of the training data were recorded at any time of the run.
        public: what the run takes as public, by name: initial weights, constants of the preprocessing.
        audit: of the finished run, if it was audited.
        unit: what is protected.
    """
    lines = [f"# Privacy card: {about.name}", ""]
    taken = plan.steps if steps is None else steps  # the most that may have been released while it goes on
    protected = about.private and not math.isinf(plan.epsilon_at(taken))
    when = f"{taken:,} of {plan.steps:,} planned steps"
    when = f"after {when}" if steps is not None else f"at the most, after {when}: the run is in progress, or was killed"
    if not about.private:
        lines += ["**This run is not private.** No clipping, no noise (`privacy=none`): the non-private control."]
    elif protected:
        if not about.secret:
            lines += [f"**No claim: {REPRODUCIBLE}** (`randomness=research`). Against all others:", ""]
        lines += [
            f"**(ε = {plan.epsilon_at(taken):.4g}, δ = {plan.delta:g})**-differential privacy for the model and for "
            f"everything logged outside `private/` and `time/`, {when}.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {text} |" for name, text in _rows(about, plan, sensitivity, taken, unit).items()),
            *(f"| {name} (public) | {text} |" for name, text in (public or {}).items()),
        ]
    else:
        lines += [
            "**This run is not private.** Gradients were clipped, but no noise was added: ε = ∞.",
            "",
            f"Clip rule: {about.clip_target}, sensitivity {sensitivity:g}{_moving(plan)}.",
        ]
    lines += ["", *card_section(audit)] if audit is not None else []
    lines += ["", "## Not accounted", "", _UNACCOUNTED] if protected else ["", _UNPROTECTED]
    if protected and diagnostics:
        lines += [
            "- **all that is named `private/…`** in metrics.csv, result.json and the tracker: raw statistics of the "
            "training data (training loss, clipped fraction, signal-to-noise, realized batch size, accuracy on "
            "held-out training data), recorded because `diagnostics=true`. Do not publish them.",
        ]
    elif protected and about.holdout:
        lines += ["- held-out training examples were not trained on; no metric on them was recorded."]
    return "\n".join(lines) + "\n"


def _rows(about: RunDescription, plan: PrivacyPlan, sensitivity: float | None, taken: int, unit: str) -> dict[str, str]:
    """List what the guarantee rests on, by name."""
    against = plan.delta * plan.dataset_size
    warning = "" if against < 1 else " — **δ is not below 1/N: it permits publishing an example outright**"
    by = {plan.accountant: plan.epsilon_at(taken), **plan.epsilon_by_others(taken)}
    by_others = ", ".join(f"by {name} {epsilon:.4g}" for name, epsilon in by.items())
    return {
        "method": _method(about),
        "privacy unit": unit,
        "neighboring datasets": "one example added or removed",
        "N": f"{plan.dataset_size:,}, taken as public",
        "δ against 1/N": f"{plan.delta:g} = {against:.2g} · 1/N{warning}",
        "sampler": f"Poisson, q = {plan.sample_rate:.6g} (expected batch {plan.batch_size:,})",
        "mechanism": f"Gaussian, released on a grid of about σS/4096 (noise version {NOISE_VERSION})",
        "clip rule": f"{about.clip_target}, sensitivity {sensitivity:g}{_moving(plan)}",
        "noise multiplier σ": f"{plan.noise_multiplier:.6g}{_shares(plan)}",
        "accountant": f"{plan.accountant}; {by_others}",
        "randomness": _randomness(about) + (_KEPT if about.secret and taken < plan.steps else ""),
    }


def _method(about: RunDescription) -> str:
    parts = [f"`{about.optimizer}`", *(f"`{name}`" for name in about.others)]
    parts += [f"a weight average of {about.ema:g}"] if about.ema is not None else []
    return f"{', '.join(parts)}, training `{about.model}` on `{about.dataset}`"


def _moving(plan: PrivacyPlan) -> str:
    return " at first, then moved at every step by a count" if plan.count_noise else ""


def _shares(plan: PrivacyPlan) -> str:
    if not plan.count_noise:
        return ""
    return (
        f" for both releases of a step together: {plan.gradient_noise_multiplier:.6g} on the clipped gradients, and "
        f"{2 * plan.count_noise:.6g} on the count of unclipped examples (noise ± {plan.count_noise:g}, sensitivity ½)"
    )


def _randomness(about: RunDescription) -> str:
    if about.secret:
        return "secret: 256 bits from the operating system, expanded by ChaCha20, erased at the end"
    return (
        f"research: expanded from seed {about.seed} by ChaCha20. Whoever knows the seed and this configuration can "
        "recompute sampling and noise; release a model only from a run with `randomness=secret`"
    )
