"""How sharp a direction an optimizer's delay allows: predicted from its response to one push, and measured.

    python scripts/delay_model.py            # a table and a figure in experiments/results/momentum

Where noise of deviation s is most of the gradient, an optimizer answers a small push δ of the gradient with a move that
begins at once or later and ends some steps after: its response R(0), R(1), …, in units of lr·δ/s. On a direction of
curvature h the push is −h times where it is, so that x_{t+1} = x_t − (lr·h/s)·Σ R(τ)·x_{t−τ}. This is stable below the
smallest lr·h/s for which e^{iω} − 1 + (lr·h/s)·Σ R(τ)·e^{−iωτ} = 0 has a solution: the prediction. The measurement runs
the optimizer on two curvatures, a sixteenth of the coordinates sharp, the others nearly flat, all under noise, and
looks whether a displacement of all sharp coordinates dies out.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import dpopt

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


def response(make: Callable, size: int, seed: int) -> np.ndarray:
    """R(τ): the mean move of a coordinate τ steps after a push by one deviation of the noise, over LR.

    Half the difference of two runs under the same noise, pushed one way and the other.
    """
    generator = torch.Generator().manual_seed(seed)
    pair = [nn.Parameter(torch.zeros(size)) for _ in range(2)]
    optimizers = [make([p]) for p in pair]
    seen = []
    for step in range(WARM + LENGTH):
        noise = torch.randn(size, generator=generator)
        for p, optimizer, push in zip(pair, optimizers, (1.0, -1.0), strict=True):
            p.grad = noise + push if step == WARM else noise.clone()
            optimizer.step()
        if step >= WARM:
            seen.append(float((pair[1] - pair[0]).detach().mean()) / (2 * LR))
    return np.diff([0.0, *seen])


def threshold(kernel: np.ndarray) -> float:
    """Find the smallest positive lr·h/s with a solution on the unit circle."""
    omega = np.linspace(1e-4, math.pi, 200_001)
    z = np.exp(1j * omega)
    answer = np.zeros_like(z)
    for tau, value in enumerate(kernel):
        answer += value * z ** (-tau)
    gain = -(z - 1) / answer
    crossing = np.flatnonzero(np.diff(np.sign(gain.imag)) != 0)
    found = [gain.real[i] for i in crossing if gain.real[i] > 0 and abs(gain.imag[i]) < 0.1 * abs(gain[i])]
    return min(found) if found else math.inf


def survives(make: Callable, curvature: float, size: int, seed: int) -> float:
    """Displace all sharp coordinates; divide the last third's amplitude by the first's."""
    generator = torch.Generator().manual_seed(seed)
    sharp = torch.zeros(size, dtype=torch.bool)
    sharp[::16] = True
    h = torch.where(sharp, curvature / LR, 0.01 * curvature / LR)
    p = nn.Parameter(torch.zeros(size))
    optimizer = make([p])
    means = []
    for step in range(3 * WARM):
        if step == WARM // 2:
            with torch.no_grad():
                p[sharp] += 0.3 / h[sharp]  # a push of .3 deviations of the noise
        p.grad = h * p.detach() + torch.randn(size, generator=generator)
        optimizer.step()
        means.append(float((h * p.detach())[sharp].mean()))
    first, last = np.abs(means[WARM // 2 : WARM]).max(), np.abs(means[-WARM:]).max()
    return last / first


def measured(make: Callable, guess: float, size: int, seed: int) -> tuple[float, float]:
    """Bounds of lr·h/s between which a displacement begins not to die out, by bisection."""
    low, high = guess / 16, guess * 4
    while high / low > 1.2:
        middle = math.sqrt(low * high)
        if survives(make, middle, size, seed) > 0.5:
            high = middle
        else:
            low = middle
    return low, high


def figure(rows: list[tuple[str, float, float, float, float, float]], path: Path) -> None:
    """Draw predicted and measured thresholds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 0.36 * len(rows) + 1.3))
    at = np.arange(len(rows))[::-1]
    ax.scatter([row[3] for row in rows], at, color="#0072B2", label="predicted from the response to a push", zorder=3)
    for y, row in zip(at, rows, strict=True):
        ax.plot(
            row[4:6], (y, y), color="#D55E00", linewidth=5, solid_capstyle="butt", label="measured" if y == 0 else None
        )
    ax.set_xscale("log")
    ax.set_yticks(at, [row[0] for row in rows])
    ax.set_xlabel("largest stable lr · curvature · (ΣR) / s")
    ax.grid(alpha=0.3, axis="x")
    ax.set_axisbelow(True)
    ax.legend(fontsize=8)
    fig.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)


def main() -> None:
    """Predict, measure, and write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1 << 18, help="coordinates")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--output", type=Path, default=Path("experiments/results/momentum"))
    arguments = parser.parse_args()
    rows = []
    head = "| | ΣR | mean age, steps | predicted | measured |\n|---|---:|---:|---:|---:|"
    print(head)
    for name in arguments.variants:
        kernel = response(VARIANTS[name], 4 * arguments.size, arguments.seed)
        total, age = kernel.sum(), (np.arange(len(kernel)) * kernel).sum() / kernel.sum()
        predicted = threshold(kernel)
        low, high = measured(VARIANTS[name], min(predicted, 40.0), arguments.size, arguments.seed + 1)
        rows.append((name, total, age, predicted * total, low * total, high * total))
        print("| {} | {:.2f} | {:.1f} | {:.2f} | {:.2f} to {:.2f} |".format(*rows[-1]), flush=True)
    figure(rows, arguments.output / "delay.png")
    lines = ["| {} | {:.2f} | {:.1f} | {:.2f} | {:.2f} to {:.2f} |".format(*row) for row in rows]
    (arguments.output / "delay.md").write_text("\n".join([head, *lines]) + "\n")


if __name__ == "__main__":
    main()
