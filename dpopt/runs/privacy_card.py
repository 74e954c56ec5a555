"""The privacy card of a run: what ε means here, and what it does not cover."""

import math

from dpopt.privacy.plan import PrivacyPlan
from dpopt.runs.description import RunDescription

_UNACCOUNTED = """\
- the choice of hyper-parameters: every other run on the same data spends privacy of its own;
- any use of the test set: ε protects training examples, and metrics on the test set are exact;
- side channels: running time, memory, and the floating-point representation of the noise (it is not discretised)."""


def privacy_card(
    about: RunDescription, plan: PrivacyPlan, sensitivity: float | None, steps: int | None, diagnostics: bool
) -> str:
    """The card, as Markdown.

    Args:
        about: names and settings of the run.
        plan: its plan.
        sensitivity: what the clip rule guarantees; None for a run without clipping.
        steps: steps taken; None while the run goes on.
        diagnostics: whether raw statistics of the training data were recorded at any time of the run.
    """
    lines = [f"# Privacy card: {about.name}", ""]
    taken = plan.steps if steps is None else steps  # the most that may have been released while it goes on
    spent = plan.epsilon_at(taken)
    when = f"{taken:,} of {plan.steps:,} planned steps"
    when = f"after {when}" if steps is not None else f"at the most, after {when}: the run is in progress, or was killed"
    if not about.private:
        lines += ["**This run is not private.** No clipping, no noise (`privacy=none`): the non-private control."]
    elif math.isinf(spent):
        lines += [
            "**This run is not private.** Gradients were clipped, but no noise was added: ε = ∞.",
            "",
            f"Clip rule: {about.clip_target}, sensitivity {sensitivity:g}{_moving(plan)}.",
        ]
    else:
        against = plan.delta * plan.dataset_size
        warning = "" if against < 1 else " — **δ is not below 1/N: it permits publishing an example outright**"
        lines += [
            f"**(ε = {spent:.4g}, δ = {plan.delta:g})**-differential privacy for the model and for everything logged "
            f"outside `private/`, {when}.",
            "",
            "| | |",
            "|---|---|",
            f"| method | {_method(about)} |",
            "| privacy unit | one training example with its label (all its augmented views together) |",
            "| neighbouring data sets | one example added or removed |",
            f"| N | {plan.dataset_size:,}, taken as public |",
            f"| δ against 1/N | {plan.delta:g} = {against:.2g} · 1/N{warning} |",
            f"| sampler | Poisson, q = {plan.sample_rate:.6g} (expected batch {plan.batch_size:,}) |",
            f"| clip rule | {about.clip_target}, sensitivity {sensitivity:g}{_moving(plan)} |",
            f"| noise multiplier σ | {plan.noise_multiplier:.6g}{_shares(plan)} |",
            f"| accountant | {plan.accountant}; by pld {plan.epsilon_at(taken, 'pld'):.4g}, "
            f"by rdp {plan.epsilon_at(taken, 'rdp'):.4g} |",
            f"| randomness | {_randomness(about)} |",
        ]
    lines += ["", "## Not accounted", "", _UNACCOUNTED]
    if about.private and diagnostics:
        lines += [
            "- **all that is named `private/…`** in metrics.csv, result.json and the tracker: raw statistics of the "
            "training data (training loss, clipped fraction, signal-to-noise, realised batch size, accuracy on "
            "held-out training data), recorded because `diagnostics=true`. Do not publish them.",
        ]
    elif about.holdout:
        lines += ["- held-out training examples were not trained on; no metric on them was recorded."]
    return "\n".join(lines) + "\n"


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
    if about.secure_rng:
        return "secret: 256 bits from the operating system, expanded by AES-256, erased at the end"
    return (
        f"research randomness: expanded from seed {about.seed}. Whoever knows the seed and this configuration can "
        "recompute sampling and noise; release a model only from a run with `secure_rng=true`"
    )
