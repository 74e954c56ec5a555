"""How sharp a direction an optimizer's delay allows: predicted from its response to one push, and measured.

    python scripts/delay_model.py            # a table and a figure in experiments/results/momentum

Where noise of deviation s is most of the gradient, an optimizer answers a small push δ of the gradient with a move that
begins at once or later and ends some steps after: its response R(0), R(1), …, in units of lr·δ/s. On a direction of
curvature h the gradient has a part h·x, so that x_{t+1} = x_t − (lr/s)·Σ R(τ)·(h·x_{t−τ} + push_{t−τ}): with
a = lr·h/s a push comes back as h·x. Its gain is √Σ_t (h·x_t/δ)²: by so much the noise of one step is found again in the
gradients of all later ones. The threshold is the a of gain 1. The measurement runs the optimizer under noise on two
curvatures, a sixteenth of the coordinates sharp, the others a hundredth of that, and pushes the sharp ones.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import dpopt
from dpopt.runs.provenance import device_name

LR = 1e-3
VARIANTS: dict[str, Any] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=LR),
    "4-bit momentum over s": lambda p: dpopt.optim.NoiseNormalizedSGD(p, lr=LR, noise_std=1.0),
    **{
        f"MicroAdam, window 10, β₁ = {b:g}": lambda p, b=b: dpopt.optim.MicroAdam(p, lr=LR, betas=(b, 0.999))
        for b in (0.9, 0.7, 0.5, 0.0)
    },
    **{
        f"MicroAdam, window {w}": lambda p, w=w: dpopt.optim.MicroAdam(p, lr=LR, window=w) for w in (1, 2, 5, 20)
    },
    "MicroAdam, no feedback": lambda p: dpopt.optim.MicroAdam(p, lr=LR, error_feedback=False),
}  # fmt: skip
WARM, LENGTH = 300, 400  # steps before the push, and after it


def pushed(make: Callable, size: int, seed: int, a: float = 0.0) -> np.ndarray:
    """Where a push of the sharp coordinates by one deviation of the noise has moved them, step by step, over LR.

    Half the difference of two runs under the same noise, pushed one way and the other; its mean over the coordinates.
    Without curvature all are pushed.
    """
    generator = torch.Generator().manual_seed(seed)
    sharp = torch.ones(size, dtype=torch.bool)
    if a:
        sharp[torch.arange(size) % 16 > 0] = False
    h = torch.where(sharp, a / LR, 0.01 * a / LR)
    pair = [nn.Parameter(torch.zeros(size)) for _ in range(2)]
    optimizers = [make([p]) for p in pair]
    seen = []
    for step in range(WARM + LENGTH):
        noise = torch.randn(size, generator=generator)
        for p, optimizer, push in zip(pair, optimizers, (1.0, -1.0), strict=True):
            p.grad = h * p.detach() + noise
            if step == WARM:
                p.grad[sharp] += push
            optimizer.step()
        if step >= WARM:
            seen.append(float((pair[1] - pair[0]).detach()[sharp].mean()) / (2 * LR))
    return np.array(seen)


def predicted_gain(kernel: np.ndarray, a: float) -> float:
    """Compute how much of a push comes back where a = lr·h/s; infinite where it grows."""
    comes_back = [0.0]  # h·x over the push
    for t in range(LENGTH):
        gradients = np.array(comes_back[: t + 1])
        gradients[0] += 1.0
        count = min(len(kernel), t + 1)
        comes_back.append(comes_back[-1] - a * float(kernel[:count] @ gradients[::-1][:count]))
        if abs(comes_back[-1]) > 1e6:
            return math.inf
    return float(np.sqrt(np.square(comes_back).sum()))


def measured_gain(make: Callable, size: int, seed: int, a: float) -> float:
    """Measure the same on an optimizer."""
    gain = float(np.sqrt(np.square(a * pushed(make, size, seed, a)).sum()))
    return gain if math.isfinite(gain) else math.inf


def threshold(of: Callable[[float], float]) -> float:
    """Find the a at which a gain is 1, to 2%."""
    low, high = 1e-3, 1e3
    while high / low > 1.02:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if of(middle) < 1 else (low, middle)
    return math.sqrt(low * high)


def figure(rows: list[tuple[str, float, float, float, float]], path: Path) -> None:
    """Draw predicted and measured thresholds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    fig, ax = plt.subplots(figsize=(7, 0.36 * len(rows) + 1.6))
    at = np.arange(len(rows))[::-1]
    ax.scatter([row[3] for row in rows], at, color="#0072B2", label="predicted from the response to a push", zorder=3)
    ax.scatter([row[4] for row in rows], at, color="#D55E00", marker="D", label="measured", zorder=3)
    ax.set_xscale("log")
    ax.set_xticks(ticks := [0.2, 0.5, 1, 2, 5], [f"{tick:g}" for tick in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_yticks(at, [row[0] for row in rows])
    ax.set_xlabel("threshold of lr · curvature · ΣR / s")
    ax.grid(alpha=0.3, axis="x")
    ax.set_axisbelow(True)
    fig.legend(*ax.get_legend_handles_labels(), fontsize=8, ncol=2, loc="lower center", frameon=False)
    fig.tight_layout(rect=(0, 0.07, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)


def page(rows: list[tuple[str, float, float, float, float]], size: int, seed: int) -> str:
    """Write the page that shows table and figure."""
    where = f"{device_name(torch.device('cpu'))} with torch {torch.__version__.partition('+')[0]}"
    lines = ["| {} | {:.2f} | {:.1f} | {:.2f} | {:.2f} |".format(*row) for row in rows]
    return f"""# How sharp a direction an optimizer's delay allows

Noise of deviation s is most of the gradient, and a direction has curvature h. A push of its gradient by one moves it by
lr · ΣR / s in the end; the mean age is that of the gradients that a move applies. The threshold is the lr · h · ΣR / s
at which later gradients give back as much as the push was. *Predicted* is from the response to a push alone, *measured*
on two curvatures, of which one is a hundredth of the other.

By `python scripts/delay_model.py`, {size:,} coordinates, seed {seed}, on {where}.

| | ΣR | mean age, steps | predicted | measured |
|---|---:|---:|---:|---:|
{chr(10).join(lines)}

![thresholds](delay.png)
"""


def main() -> None:
    """Predict, measure, and write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1 << 17, help="coordinates")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--output", type=Path, default=Path("experiments/results/momentum"))
    arguments = parser.parse_args()
    rows = []
    for name in arguments.variants:
        make = VARIANTS[name]
        kernel = np.diff(pushed(make, 4 * arguments.size, arguments.seed), prepend=0.0)
        total, age = kernel.sum(), (np.arange(len(kernel)) * kernel).sum() / kernel.sum()
        predicted = threshold(partial(predicted_gain, kernel))
        found = threshold(partial(measured_gain, make, arguments.size, arguments.seed + 1))
        rows.append((name, total, age, predicted * total, found * total))
        print("{}: ΣR {:.2f}, mean age {:.1f}, predicted {:.2f}, measured {:.2f}".format(*rows[-1]), flush=True)
    figure(rows, arguments.output / "delay.png")
    (arguments.output / "delay.md").write_text(page(rows, arguments.size, arguments.seed))


if __name__ == "__main__":
    main()
