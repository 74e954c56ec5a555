"""MicroAdam over very many steps: does its error feedback stay bounded, and how far does it end from Adam?

    python scripts/long_runs.py                  # 100,000 steps; a page and a figure in experiments/results/long_runs
    python scripts/long_runs.py --steps 1000

Two problems without privacy, each under one fixed sequence of gradients' batches for all optimizers:

    digits      a network 64-256-10 on scikit-learn's digits, batches of 64
    quadratic   ½Σ h_i x_i² of 4,096 dimensions, h from 0.01 to 100, at a tenth of MicroAdam's usual density and a large
                learning rate: (1 + ω)·√(1 − k/d) > 1, outside of what 2405.15593 proves, and MicroAdam leaves its start

Recorded at a hundred steps: the loss, the norm ‖e‖ of the error feedback, and the drift ‖θ − θ_Adam‖ over the distance
that Adam has moved; at the first and the last of them also (1 + ω)·√(1 − k/d), which is above 1 before a loss tells; at
the end, for digits, the accuracy on the test set.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpopt
from dpopt.runs.provenance import device_name

POINTS = 100
BATCH = 64
LEAST = 1e-8  # of a loss in the figure
COLORS = ("#000000", "#0072B2", "#009E73", "#D55E00", "#56B4E9", "#CC79A7")
FORMS = {
    "MicroAdam, no rounding, per block": dict(bits=32, scope="block"),
    "MicroAdam, 4 bits, per block": dict(bits=4, scope="block"),
    "MicroAdam, 2 bits, per block": dict(bits=2, scope="block"),
    "MicroAdam, 4 bits, per tensor": dict(bits=4, scope="tensor"),
    "MicroAdam, 2 bits, per tensor": dict(bits=2, scope="tensor"),
}


@dataclass
class Problem:
    """What is minimized.

    Attributes:
        name: of the problem.
        lr: learning rate of all optimizers.
        density: of MicroAdam.
        start: () → parameters, the same at every call.
        loss: (parameters, step) → the loss whose gradient is followed; a step of None for the whole loss.
        accuracy: parameters → accuracy on the test set; None where there is none.
    """

    name: str
    lr: float
    density: float
    start: Callable[[], list[nn.Parameter]]
    loss: Callable[[list[nn.Parameter], int | None], Tensor]
    accuracy: Callable[[list[nn.Parameter]], float] | None = None


@dataclass
class Course:
    """What one optimizer did, at the recorded steps."""

    begin: float = float("nan")  # the loss at the start
    seconds: float = 0.0
    loss: list[float] = field(default_factory=list)
    feedback: list[float] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)
    points: list[Tensor] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)  # at the first and the last of them
    accuracy: float = float("nan")


def digits() -> Problem:
    """Set up the network on digits."""
    sources = dpopt.data.digits().load(Path(), torch.device("cpu"), 0)
    (x, y), (test_x, test_y) = (next(source.plain(len(source))) for source in sources)
    x, test_x = x.flatten(1), test_x.flatten(1)

    def start() -> list[nn.Parameter]:
        torch.manual_seed(0)
        layers = nn.Linear(64, 256), nn.Linear(256, 10)
        return [p for layer in layers for p in layer.parameters()]

    def outputs(p: list[nn.Parameter], inputs: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(inputs, p[0], p[1])), p[2], p[3])

    def loss(p: list[nn.Parameter], step: int | None) -> Tensor:
        if step is None:
            return F.cross_entropy(outputs(p, x), y)
        at = torch.randint(len(x), (BATCH,), generator=torch.Generator().manual_seed(step))
        return F.cross_entropy(outputs(p, x[at]), y[at])

    def accuracy(p: list[nn.Parameter]) -> float:
        return float((outputs(p, test_x).argmax(1) == test_y).double().mean())

    return Problem("digits", 1e-3, 0.01, start, loss, accuracy)


def quadratic(size: int = 4096) -> Problem:
    """Set up the quadratic; one tensor is one block, so that both scopes are the same."""
    curvature = torch.logspace(-2, 2, size)

    def start() -> list[nn.Parameter]:
        return [nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(0)))]

    def loss(p: list[nn.Parameter], step: int | None) -> Tensor:
        return (curvature * p[0].square()).sum() / 2

    return Problem("quadratic", 0.1, 0.001, start, loss)


def course(problem: Problem, make: Callable, steps: int, adam: Course | None) -> Course:
    """Run an optimizer; measure its drift from a course of Adam."""
    parameters = problem.start()
    found = Course(begin=problem.loss(parameters, None).item())
    optimizer = make(parameters)
    first = nn.utils.parameters_to_vector(parameters).detach().clone()
    recorded = record_steps(steps)
    for step in range(1, steps + 1):
        began = time.perf_counter()
        gradients = torch.autograd.grad(problem.loss(parameters, step), parameters)
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g
        ends = adam is not None and step in (min(recorded), steps)
        after = optimizer.step_metrics() if ends else None
        optimizer.step()
        found.seconds += time.perf_counter() - began
        if after is not None:
            measured = after()
            found.factors += [(1 + measured["optimizer/quantization_omega"]) * measured["optimizer/contraction"]]
        if step in recorded:
            _record(found, problem, parameters, optimizer, first, adam)
    found.accuracy = problem.accuracy(parameters) if problem.accuracy else float("nan")
    return found


@torch.no_grad()
def _record(
    found: Course,
    problem: Problem,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    first: Tensor,
    adam: Course | None,
) -> None:
    """Measure where an optimizer is."""
    here = nn.utils.parameters_to_vector(parameters).clone()
    found.loss.append(float(problem.loss(parameters, None)))
    if adam is None:
        found.points.append(here)
        return
    there = adam.points[len(found.drift)]
    found.drift.append(float((here - there).norm() / (there - first).norm()))
    assert isinstance(optimizer, dpopt.optim.MicroAdam)
    squares = sum(float(optimizer.feedback(p).double().square().sum()) for p in parameters if p.numel() > 256)
    found.feedback.append(squares**0.5)


def record_steps(steps: int) -> set[int]:
    """List the recorded steps, evenly spaced, the last one included."""
    return {round(i * steps / POINTS) for i in range(1, POINTS + 1)} - {0}


def courses(problem: Problem, steps: int) -> dict[str, Course]:
    """Run all optimizers on a problem."""
    found = {"Adam": course(problem, lambda p: torch.optim.Adam(p, lr=problem.lr), steps, None)}
    for name, form in FORMS.items():
        options = dict(lr=problem.lr, density=problem.density, dense_size=256, **form)
        found[name] = course(problem, lambda p, o=options: dpopt.optim.MicroAdam(p, **o), steps, found["Adam"])
        print(f"{problem.name}, {name}: {found[name].seconds:.0f} s", flush=True)
    return found


def page(results: dict[str, dict[str, Course]], steps: int) -> str:
    """Write the page."""
    lines = [
        "# MicroAdam over many steps",
        "",
        f"{steps:,} steps without noise, one seed, by `python scripts/long_runs.py --steps {steps}`, on "
        f"{device_name(torch.device('cpu'))} with torch {torch.__version__.partition('+')[0]}.",
        "",
    ]
    for name, found in results.items():
        lines += [
            f"## {name}",
            "",
            "| | loss at the start | at the end | largest ‖e‖ | last ‖e‖ | drift from Adam |",
        ]
        lines[-1] += f" (1 + ω)·√(1 − k/d), step {min(record_steps(steps)):,} | at the end | test accuracy |"
        lines.append("|---" * 9 + "|")
        for optimizer, c in found.items():
            feedback = (max(c.feedback), c.feedback[-1]) if c.feedback else (float("nan"),) * 2
            drift = c.drift[-1] if c.drift else 0.0
            factors = (c.factors[0], c.factors[-1]) if c.factors else (float("nan"),) * 2
            numbers = (c.begin, c.loss[-1], *feedback, drift, *factors, c.accuracy)
            cells = ("" if n != n else f"{n:.3g}" for n in numbers)
            lines.append(f"| {optimizer} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join([*lines, "![courses](long_runs.png)", ""])


def figure(results: dict[str, dict[str, Course]], steps: int, path: Path) -> None:
    """Draw loss, error feedback and drift over the steps, one row per problem."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    at = np.array(sorted(record_steps(steps)))
    drawn, axes = plt.subplots(len(results), 3, figsize=(13, 3.6 * len(results)), squeeze=False)
    for row, (name, found) in zip(axes, results.items(), strict=True):
        for axis, (key, label) in zip(
            row, [("loss", "loss"), ("feedback", "‖e‖"), ("drift", "drift from Adam")], strict=True
        ):
            for number, (optimizer, c) in enumerate(found.items()):
                if values := getattr(c, key):
                    shown = np.maximum(values, LEAST) if key == "loss" else values
                    axis.plot(at, shown, label=optimizer, lw=1, color=COLORS[number], ls=(0, (4, number % 3)))
            axis.set(title=name, xlabel="step", ylabel=label, yscale="log")
    drawn.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, ncol=3, loc="lower center", frameon=False)
    drawn.tight_layout(rect=(0, 0.08, 1, 1))
    drawn.savefig(path, dpi=120)
    plt.close(drawn)


def main() -> None:
    """Run everything; write the page and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--output", type=Path, default=Path("experiments/results/long_runs"))
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error("--steps must be at least 1")
    results = {problem.name: courses(problem, arguments.steps) for problem in (digits(), quadratic())}
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "long_runs.md").write_text(page(results, arguments.steps))
    figure(results, arguments.steps, arguments.output / "long_runs.png")


if __name__ == "__main__":
    main()
