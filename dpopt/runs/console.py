"""What a person sees: the plan before, one live line during, the result after."""

import math
import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dpopt import ranks
from dpopt.config.overrides import program
from dpopt.grad_sample.engine import GradSampler
from dpopt.privacy.accounting import gdp_mu
from dpopt.privacy.clipping import ClipRule
from dpopt.privacy.noise import NOISE_VERSION
from dpopt.privacy.plan import PrivacyPlan
from dpopt.runs.description import RunDescription
from dpopt.runs.provenance import short_commit
from dpopt.runs.result import HOLDOUT, REPRODUCIBLE, Estimate
from dpopt.runs.sweep import duration, size

_HOUR = 3600
_TAKEN = {
    "losses": "two losses per example",
    "features": "features of each example, once",
    "updates": "the update of each client",
}
_SILENCE = 60  # seconds after which a log file gets a line although nothing was evaluated


def console() -> Console:
    """Make a console as wide as the terminal, 100 columns elsewhere."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=100)


def plan_panel(
    about: RunDescription, plan: PrivacyPlan, clip: ClipRule | None, guess: Estimate, engine: GradSampler
) -> None:
    """Print the plan; warn when it is long."""
    device = next(engine.model.parameters()).device.type
    views = f", {about.views} views" if about.views > 1 else ""
    together = f", {ranks.share().world} ranks" if ranks.share().world > 1 else ""
    rows = [
        ("data", f"{about.dataset}, N = {plan.dataset_size:,} (public)"),
        *([("hold-out", _hold_out(about))] if about.holdout else []),
        (
            "sampling",
            f"{plan.sampling}, batch {plan.batch_size:,}, {plan.steps:,} steps"
            f" = {plan.steps * plan.sample_rate:.4g} epochs{views}",
        ),
        ("privacy", _privacy(about, plan, clip)),
        *(_noise_rows(about, plan, clip) if clip is not None and plan.noise_multiplier > 0 else []),
        ("model", f"{about.model}, {guess.parameters:,} trainable parameters, {about.precision} on {device}{together}"),
        ("optimizer", f"{about.optimizer_call}, state {_state(guess)}"),
        *([("filter", about.filter_call)] if about.filter_call else []),
        *([("schedule", about.schedule_call)] if about.schedule_call else []),
        *([("evaluated", f"the average of the weights, decay {about.ema:g}")] if about.ema is not None else []),
        ("gradients", _gradients(about, engine, guess.micro_batch)),
        (
            "peak memory",
            "unknown" if guess.memory_bytes is None else f"about {size(guess.memory_bytes)} excluding code and data",
        ),
        ("time", _time(guess.seconds, about.max_length)),
    ]
    console().print(_panel(f"{'plan' if about.dry_run else 'run'} · {about.name}", rows, "cyan"))
    if guess.seconds is not None and guess.seconds > _HOUR and device == "cpu":
        say(
            f"This plan takes more than an hour on this machine. For a first look: {program()} experiment=quickstart",
            "yellow",
        )


def say(text: str, style: str = "") -> None:
    """Print a line as it is: the terminal wraps it, so that a command in it can be copied."""
    console().print(Text(text, style=style), soft_wrap=True)


def _noise_rows(about: RunDescription, plan: PrivacyPlan, clip: ClipRule) -> list[tuple[str, str]]:
    """Describe noise and accounting of a run that has noise."""
    mu = gdp_mu(*plan.composed(plan.steps), plan.statistics_noise)
    by = {plan.accountant: plan.epsilon, **plan.epsilon_by_others(plan.steps)}
    told = [f"{name} ε = {epsilon:.4g}" for name, epsilon in by.items()]
    told[0] += " (used for the guarantee)"
    count = f", count ± {plan.count_noise:g}" if plan.count_noise else ""
    count += f", statistics of channels σ = {plan.statistics_noise:g}" if plan.statistics_noise else ""
    kept = f", {plan.mechanism.kept} vectors kept" if plan.mechanism.kept else ""
    over_steps = "" if plan.sampler == "poisson" else f", correlated over steps by {about.mechanism_call}{kept}"
    rule = f"S = {clip.sensitivity:g} ({about.clip} clip)"
    return [
        ("noise", f"σ = {plan.noise_multiplier:.4f}, {rule}{count}{over_steps}"),
        ("accounting", " · ".join([*told, f"Gaussian DP μ = {mu:.3g} (approximate)"])),
    ]


def _hold_out(about: RunDescription) -> str:
    """Say whether the hold-out is measured, which costs privacy that ε does not count."""
    measured = "measured, outside ε" if about.private else "measured"
    if about.diagnostics:
        return f"{about.holdout:g} of the examples, {measured}"
    return f"{about.holdout:g} of the examples, not measured: with diagnostics=true they are {measured}"


def _state(guess: Estimate) -> str:
    if guess.optimizer_state_bytes is None:
        return "unknown"
    each = guess.optimizer_state_bytes / guess.parameters
    return f"{size(guess.optimizer_state_bytes)} = {each:.2f} B/parameter (Adam: {size(guess.adam_state_bytes)})"


def _gradients(about: RunDescription, engine: GradSampler, micro_batch: int) -> str:
    """Say how gradients are taken, and which layers no rule covers."""
    size = f"micro-batches of {micro_batch:,}"
    if about.takes != "gradients":
        return f"none: {_TAKEN.get(about.takes, about.takes)}, {size}"
    if not about.private:
        return f"of whole {size}"
    whole = {"vmap": "by vmap", "loop": "by a loop"}
    how = whole.get(engine.policy, f"by per-layer rules ({engine.policy})")
    if engine.policy not in whole and engine.fallbacks:
        more = len(engine.fallbacks) - 3
        how += f", {', '.join(engine.fallbacks[:3])}{f' and {more} more' if more > 0 else ''} without a rule"
    return f"per example {how}, {size}{', compiled' if about.compiled else ''}"


def result_panel(result: dict[str, Any], directory: str, fresh: bool) -> None:
    """Print the result, and how to go on after a run that was stopped."""
    private = math.isfinite(result["epsilon"])
    rows = [
        *([("hold-out", f"accuracy {result[HOLDOUT]:.2%}")] if HOLDOUT in result else []),
        ("test accuracy", f"{result['test_accuracy']:.2%}   (test loss {result['test_loss']:.4f})"),
        (
            "privacy",
            f"ε = {result['epsilon']:.4g} at δ = {result['delta']:g} ({result['accountant']}), "
            f"{result['epsilon_rdp']:.4g} by rdp" + (f"; {REPRODUCIBLE}" if REPRODUCIBLE in result["guarantee"] else "")
            if private
            else "none: ε = ∞",
        ),
        (
            "steps",
            f"{result['steps']:,} of {result['planned_steps']:,} in {duration(result['wall_seconds'])}, "
            f"{result['examples_per_second']:,.0f} examples/s",
        ),
        (
            "memory",
            f"optimizer state {size(result['optimizer_state_bytes'])}, peak {size(result['peak_memory_bytes'])}"
            + (" of the whole process" if result["device"].startswith("cpu") else ""),
        ),
        ("files", f"{directory}/"),
    ]
    done = result["status"] == "finished"
    title = "result" if done else f"{result['status']}: the same command{' less fresh=true' if fresh else ''} continues"
    console().print(_panel(title, rows, "green" if done else "yellow"))


def already_finished(result: dict[str, Any], directory: str, commit: str | None, note: str) -> None:
    """Print the result of a finished run; warn when the code has moved on."""
    accuracy = f"{result[HOLDOUT]:.2%} on the hold-out" if HOLDOUT in result else f"{result['test_accuracy']:.2%}"
    say(
        f"finished: {directory}: accuracy {accuracy}, ε = {result['epsilon']:.4g}, "
        f"commit {short_commit(result.get('git_commit'))} (fresh=true retrains)"
    )
    if note:
        say(f"  {note}", "yellow")
    if (version := result.get("noise_version", 1)) != NOISE_VERSION:
        say(f"  noise version {version}: the code draws noise by version {NOISE_VERSION} now", "yellow")
    if commit and result.get("git_commit") and commit != result["git_commit"]:
        say(f"  the code is at {short_commit(commit)} now: this result may be out of date", "yellow")


class Progress:
    """The live line: rewritten in place on a terminal, a line per evaluation or minute elsewhere.

    Args:
        plan: for the number of steps and the target ε.
        start: step of this process's first step.
        shown: whether anything is printed.
    """

    def __init__(self, plan: PrivacyPlan, start: int, shown: bool = True) -> None:
        self.plan, self.start, self.began = plan, start, time.perf_counter()
        self.console = console() if shown else Console(quiet=True, force_terminal=False)
        self.live = Live(console=self.console, refresh_per_second=4, transient=True)
        self.values: dict[str, float] = {}
        self.printed = self.began

    def __enter__(self) -> "Progress":
        if self.start:
            self.console.print(f"continues after step {self.start:,} of {self.plan.steps:,}", highlight=False)
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def step(self, step: int) -> None:
        """Show a step."""
        if self.console.is_terminal:
            self.live.update(Text(self._line(step)))
        elif time.perf_counter() - self.printed > _SILENCE:
            self._print(step)

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """Show new metrics."""
        self.values = values
        if self.console.is_terminal:
            self.step(step)
        else:
            self._print(step)

    def _print(self, step: int) -> None:
        self.console.print(self._line(step), highlight=False, soft_wrap=True)
        self.printed = time.perf_counter()

    def _line(self, step: int) -> str:
        elapsed = time.perf_counter() - self.began
        done = step - self.start
        rate = done * self.plan.batch_size / max(elapsed, 1e-9)
        left = elapsed / done * (self.plan.steps - step) if done else math.nan
        parts = [f"step {step:,}/{self.plan.steps:,}"]
        if HOLDOUT in self.values:
            parts.append(f"accuracy {self.values[HOLDOUT]:.2%} on the hold-out")
        elif "test/accuracy" in self.values:
            parts.append(f"accuracy {self.values['test/accuracy']:.2%}")
        if "private/train_loss" in self.values:
            parts.append(f"train loss {self.values['private/train_loss']:.3f}")
        if math.isfinite(self.values.get("privacy/epsilon", math.inf)):
            parts.append(f"ε {self.values['privacy/epsilon']:.3g} of {self.plan.epsilon:.3g}")
        parts.append(f"{rate:,.0f} examples/s")
        if math.isfinite(left):
            parts.append(f"{duration(left)} left")
        return " · ".join(parts)


def _panel(title: str, rows: list[tuple[str, str]], color: str) -> Panel:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for name, text in rows:
        grid.add_row(name, Text(text))
    return Panel(grid, title=Text(title), title_align="left", border_style=color, expand=False)


def _privacy(about: RunDescription, plan: PrivacyPlan, clip: ClipRule | None) -> str:
    if clip is None:
        return "none: no clipping, no noise"
    if plan.noise_multiplier == 0:
        return f"none: clipping to {clip.sensitivity:g} without noise, ε = ∞"
    secret = "secret randomness" if about.secret else REPRODUCIBLE
    against = plan.delta * plan.dataset_size
    weak = "" if against < 1 else " (not below 1/N: a guarantee in name only)"
    return f"ε = {plan.epsilon:.4g}, δ = {plan.delta:g} = {against:.2g}/N{weak}, {secret}"


def _time(seconds: float | None, max_length: int | None) -> str:
    if seconds is None:
        return "unknown"
    if max_length is not None:
        return (
            f"at most {duration(seconds)} (from a timed micro-batch of texts of {max_length} tokens; shorter take less)"
        )
    return f"about {duration(seconds)} (from one timed micro-batch on this machine, evaluation not counted)"
