"""The privacy card of a run: what ε means here, and what it does not cover."""

import math

from dpopt.config import Config
from dpopt.plan import PrivacyPlan

_UNACCOUNTED = """\
- the choice of hyper-parameters: every other run on the same data spends privacy of its own;
- any use of the test set: test metrics describe other people's data, on which the model was not trained;
- side channels: running time, memory, and the floating-point representation of the noise (it is not discretised)."""


def privacy_card(
    config: Config, plan: PrivacyPlan, sensitivity: float | None, steps: int, name: str, diagnostics: bool
) -> str:
    """The card, as Markdown.

    Args:
        config: the run's configuration.
        plan: its plan.
        sensitivity: what the clip rule guarantees; None for a run without clipping.
        steps: steps taken, or the most that may have been taken while the run goes on.
        name: the run's name.
        diagnostics: whether raw statistics of the training data were recorded at any time of the run.
    """
    lines = [f"# Privacy card: {name}", ""]
    spent = plan.epsilon_at(steps)
    if not config.private:
        lines += ["**This run is not private.** No clipping, no noise (`privacy=none`): the non-private control."]
    elif math.isinf(spent):
        lines += [
            "**This run is not private.** Gradients were clipped, but no noise was added: ε = ∞.",
            "",
            f"Clip rule: {config.clipping['_target_']}, sensitivity {sensitivity:g}{_moving(plan)}.",
        ]
    else:
        against = plan.delta * plan.dataset_size
        warning = "" if against < 1 else " — **δ is not below 1/N: it permits publishing an example outright**"
        lines += [
            f"**(ε = {spent:.4g}, δ = {plan.delta:g})**-differential privacy for the model and for everything logged "
            f"outside `private/`, after {steps:,} of {plan.steps:,} planned steps.",
            "",
            "| | |",
            "|---|---|",
            "| privacy unit | one training example with its label (all its augmented views together) |",
            "| neighbouring data sets | one example added or removed |",
            f"| N | {plan.dataset_size:,}, taken as public |",
            f"| δ against 1/N | {plan.delta:g} = {against:.2g} · 1/N{warning} |",
            f"| sampler | Poisson, q = {plan.sample_rate:.6g} (expected batch {plan.batch_size:,}) |",
            f"| clip rule | {config.clipping['_target_']}, sensitivity {sensitivity:g}{_moving(plan)} |",
            f"| noise multiplier σ | {plan.noise_multiplier:.6g}{_shares(plan)} |",
            f"| accountant | {plan.accountant}; by pld {plan.epsilon_at(steps, 'pld'):.4g}, "
            f"by rdp {plan.epsilon_at(steps, 'rdp'):.4g} |",
            f"| randomness | {_randomness(config)} |",
        ]
    lines += ["", "## Not accounted", "", _UNACCOUNTED]
    if config.private and diagnostics:
        lines += [
            "- **the series under `private/`**: raw statistics of the training data (training loss, clipped fraction, "
            "signal-to-noise, realised batch size, accuracy on held-out training data), recorded because "
            "`diagnostics=true`. Do not publish them.",
        ]
    elif config.holdout:
        lines += ["- held-out training examples were not trained on; no metric on them was recorded."]
    return "\n".join(lines) + "\n"


def _moving(plan: PrivacyPlan) -> str:
    return " at first, then moved at every step by a count" if plan.count_noise else ""


def _shares(plan: PrivacyPlan) -> str:
    if not plan.count_noise:
        return ""
    shares = f"{plan.gradient_noise_multiplier:.6g} on the gradients and {2 * plan.count_noise:.6g} on the count"
    return f", of both releases of a step together: {shares}, each over its sensitivity"


def _randomness(config: Config) -> str:
    if config.secure_rng:
        return "secret: 256 bits from the operating system, expanded by AES-256, erased at the end"
    return (
        f"research randomness: expanded from seed {config.seed}. Whoever knows the seed and this configuration can "
        "recompute sampling and noise; release a model only from a run with `secure_rng=true`"
    )
