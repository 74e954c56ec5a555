"""Time and memory of an optimizer step, with and without the noise, side by side in one run.

    python scripts/bench_optim.py                                     # this machine; CUDA where there is a GPU
    python scripts/bench_optim.py --models wrn_16_4 --rounds 30

All variants share parameters and gradients and take turns, round by round; a figure is the median over the rounds, with
the quartiles, and a ratio is the median of the ratios within a round. `paper` is the algorithm of 2511.20509 rendered
literally: tensor by tensor, nothing quantized. `normal_` draws the noise of the alternatives into one buffer and does
no more; `normal_, added` also adds it and divides by qN, as ours does.
"""

import argparse
import importlib
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torchvision

from dpopt.machine import processor
from dpopt.models import wrn_16_4
from dpopt.optim import MicroAdam
from dpopt.privacy.noise import NOISE_VERSION, add_noise
from dpopt.rng import RandomKey
from dpopt.runs.provenance import git_commit, short_commit
from dpopt.training.cost import optimizer_state_bytes

BASELINE = "AdamW (fused)"
# Bytes moved per fp32 parameter and step where it is known: gradient and parameter read, parameter written, state read
# and written. MicroAdam's is derived in triton_kernels.py; the 64-byte lines of a CPU hold .8 of the
# parameters where the 32-byte sectors of a GPU hold .57.
TRAFFIC = {"AdamW (fused)": 28, "Adam (fused)": 28, "SGD": 12}
GPU_TRAFFIC = {**TRAFFIC, "MicroAdam 4-bit": 10.1, "MicroAdam 8-bit": 11.1, "MicroAdam 32-bit": 17.5}
CPU_TRAFFIC = {**TRAFFIC, "MicroAdam 4-bit": 11.9, "MicroAdam 8-bit": 12.9, "MicroAdam 32-bit": 19.1}


class PaperMicroAdam(torch.optim.Optimizer):
    """The algorithm of 2511.20509, literally: for each tensor a dense fp32 error feedback and a window of k values."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, density=0.01, window=10):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, density=density, window=window))

    @torch.no_grad()
    def step(self, closure=None):
        """One step; there is no closure."""
        for group in self.param_groups:
            for p in group["params"]:
                state, k = self.state[p], math.ceil(group["density"] * p.numel())
                if not state:
                    state["step"] = 0
                    state["error"] = torch.zeros(p.numel(), device=p.device)
                    state["indices"] = torch.zeros(group["window"], k, dtype=torch.int64, device=p.device)
                    state["values"] = torch.zeros(group["window"], k, device=p.device)
                state["step"] += 1
                t, m, error = state["step"], group["window"], state["error"]
                accumulated = p.grad.flatten() + error
                chosen = accumulated.abs().topk(k).indices
                state["indices"][(t - 1) % m], state["values"][(t - 1) % m] = chosen, accumulated[chosen]
                error.copy_(accumulated)
                error[chosen] = 0
                first, second = torch.zeros_like(error), torch.zeros_like(error)
                for row in range(min(t, m)):
                    age = (t - 1 - row) % m
                    at, value = state["indices"][row], state["values"][row]
                    first.index_add_(0, at, value, alpha=group["betas"][0] ** age)
                    second.index_add_(0, at, value.square(), alpha=group["betas"][1] ** age)
                first *= (1 - group["betas"][0]) / (1 - group["betas"][0] ** t)
                second *= (1 - group["betas"][1]) / (1 - group["betas"][1] ** t)
                p.sub_((group["lr"] * first / (second.sqrt() + group["eps"])).view(p.shape))


def shapes(name: str) -> list[torch.Size]:
    """List the shapes of a model's parameters."""
    if name == "300m":
        return [torch.Size([2048, 2048])] * 72 + [torch.Size([2048])] * 144
    with torch.device("meta"):
        model = {
            "wrn_16_4": lambda: wrn_16_4(num_classes=10),
            "resnet50": lambda: torchvision.models.resnet50(),
            "deit_base": lambda: timm.create_model("deit_base_patch16_224"),
        }[name]()
    return [p.shape for p in model.parameters()]


def variants(parameters: list[torch.nn.Parameter]) -> dict[str, torch.optim.Optimizer]:
    """Every optimizer of the comparison that imports here, by its label."""
    found = {
        "MicroAdam 4-bit": MicroAdam(parameters),
        "MicroAdam 8-bit": MicroAdam(parameters, bits=8),
        "MicroAdam 32-bit": MicroAdam(parameters, bits=32),
        "MicroAdam 4-bit, reference": MicroAdam(parameters, kernels="torch"),
        BASELINE: torch.optim.AdamW(parameters, fused=True),
        "AdamW (foreach)": torch.optim.AdamW(parameters, foreach=True),
        "Adam (fused)": torch.optim.Adam(parameters, fused=True),
        "SGD": torch.optim.SGD(parameters, lr=1e-3),
        "paper, per tensor": PaperMicroAdam(parameters),
    }
    for package, attribute, label in (
        ("bitsandbytes.optim", "AdamW8bit", "AdamW 8-bit (bitsandbytes)"),
        ("torchao.optim", "AdamW8bit", "AdamW 8-bit (torchao)"),
    ):
        try:
            found[label] = getattr(importlib.import_module(package), attribute)(parameters)
        except (ImportError, AttributeError, RuntimeError):
            print(f"{label}: not installed, left out")
    return found


def measure(calls: dict[str, Callable[[], None]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call, one list entry per round; the calls take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 2):  # the first two pay for memory and compilation
        for name, call in calls.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def bench(name: str, device: torch.device, rounds: int, fill: int = 10) -> list[dict]:
    """One row per variant for the shapes of a model, noise alone included."""
    sizes = shapes(name)
    count = sum(s.numel() for s in sizes)
    generator = torch.Generator(device).manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(s, device=device, generator=generator)) for s in sizes]
    total = torch.randn(count, device=device, generator=generator)
    for p, part in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view(p.shape)
    key, scratch = RandomKey.from_seed(0), torch.empty(max(s.numel() for s in sizes), device=device)
    steps = iter(range(10**9))

    def our_noise() -> None:
        add_noise(total, 1.0, 1.4, key, next(steps))  # the divisor keeps the gradient's size from step to step

    def drawn() -> None:
        for p in parameters:
            scratch[: p.numel()].normal_()

    def drawn_and_added() -> None:
        for p in parameters:
            assert p.grad is not None
            p.grad.add_(scratch[: p.numel()].normal_().view(p.shape)).div_(1.4)

    optimizers = variants(parameters)
    for optimizer in optimizers.values():
        for _ in range(fill if "Adam" in type(optimizer).__name__ else 1):
            optimizer.step()  # a full window

    def both(noise: Callable[[], None], step: Callable[[], None]) -> Callable[[], None]:
        def call() -> None:
            noise()
            step()

        return call

    calls: dict[str, Callable[[], None]] = {label: o.step for label, o in optimizers.items()}
    calls |= {"noise": our_noise, "normal_": drawn, "normal_, added": drawn_and_added}
    pairs = [("noise", "MicroAdam 4-bit"), ("normal_", BASELINE), ("normal_, added", BASELINE)]
    pairs += [("normal_, added", "paper, per tensor")]
    calls |= {f"{noise} + {label}": both(calls[noise], optimizers[label].step) for noise, label in pairs}
    times = measure(calls, device, rounds)
    return rows_of(name, times, optimizers, count, device)


def rows_of(
    name: str,
    times: dict[str, list[float]],
    optimizers: dict[str, torch.optim.Optimizer],
    count: int,
    device: torch.device,
) -> list[dict]:
    """Summarize the times of every variant, with the ratio to what it is compared with."""
    rows = []
    for label, milliseconds in times.items():
        base = f"normal_ + {BASELINE}" if " + " in label else BASELINE if label in optimizers else "normal_"
        ratios = [a / b for a, b in zip(milliseconds, times[base], strict=True)]
        quartiles = statistics.quantiles(milliseconds, n=4)
        traffic = (GPU_TRAFFIC if device.type == "cuda" else CPU_TRAFFIC).get(label)
        rows.append(
            {
                "model": name,
                "parameters": count,
                "variant": label,
                "ms": quartiles[1],
                "low": quartiles[0],
                "high": quartiles[2],
                "ratio": statistics.median(ratios),
                "against": base,
                "bytes": optimizer_state_bytes(optimizers[label]) / count if label in optimizers else None,
                "bandwidth": traffic * count / quartiles[1] / 1e6 if traffic else None,
            }
        )
    return rows


def markdown(rows: list[dict], header: str) -> str:
    """Write the table of one machine."""
    lines = [header, ""]
    for model in dict.fromkeys(row["model"] for row in rows):
        chosen = [row for row in rows if row["model"] == model]
        lines += [f"## {model}: {chosen[0]['parameters']:,} parameters", ""]
        lines += [
            "| | ms, median (quartiles) | ratio | against | state, B/param | GB/s |",
            "|---|---:|---:|---|---:|---:|",
        ]
        for row in chosen:
            state = f"{row['bytes']:.3f}" if row["bytes"] is not None else ""
            bandwidth = f"{row['bandwidth']:.0f}" if row["bandwidth"] else ""
            spread = f"{row['ms']:.4g} ({row['low']:.4g}–{row['high']:.4g})"
            lines.append(
                f"| {row['variant']} | {spread} | {row['ratio']:.2f} | {row['against']} | {state} | {bandwidth} |"
            )
        lines.append("")
    return "\n".join(lines)


def figure(rows: list[dict], path: Path, title: str) -> None:
    """Draw step times as dots, one panel per model, with bytes of state."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in rows))
    fig, axes = plt.subplots(1, len(models), figsize=(1.8 + 3.2 * len(models), 3.4), squeeze=False, sharey=True)
    for ax, model in zip(axes[0], models, strict=True):
        chosen = [row for row in rows if row["model"] == model and row["bytes"] is not None][::-1]
        ours = [row["variant"].startswith("MicroAdam") for row in chosen]
        times = [row["ms"] for row in chosen]
        # Dots: the length of a bar means nothing on a logarithmic axis.
        ax.scatter(times, [row["variant"] for row in chosen], color=["#009E73" if o else "#777777" for o in ours])
        for row in chosen:
            figures = f"{row['ms']:{',.0f' if row['ms'] >= 100 else '.3g'}} ms, {row['bytes']:.2f} B"
            ax.text(row["ms"] * 1.2, row["variant"], figures, va="center", fontsize=7)
        ax.set(xscale="log", xlabel="step, ms (median)", title=f"{model}, {chosen[0]['parameters'] / 1e6:.1f} M")
        ax.set_xlim(min(times) / 1.5, max(times) * 15)
        ax.grid(alpha=0.3, axis="x")
        ax.set_axisbelow(True)
    fig.suptitle(f"Optimizer step, and bytes of state per parameter. {title}", fontsize=9)
    fig.tight_layout()
    fig.savefig(path, dpi=150)


def main() -> None:
    """Measure, print, and write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["wrn_16_4", "resnet50", "deit_base", "300m"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--output", type=Path, default=Path("experiments/results/benchmarks"), help="folder of table and figure"
    )
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"warning: the load of this machine is {load:.1f}; wait until it is quiet")
    rows = []
    for name in arguments.models:
        rows += bench(name, device, arguments.rounds)
        print(markdown([row for row in rows if row["model"] == name], ""), flush=True)
    machine = hardware(device)
    header = (
        f"# Optimizer step: time and memory\n\n{machine}; {versions()}. {command()}: {arguments.rounds} rounds, "
        f"all variants in turn.\nRatios are medians of the ratios within a round.\n\n![](bench_optim_{device.type}.png)"
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / f"bench_optim_{device.type}.md").write_text(markdown(rows, header))
    figure(rows, arguments.output / f"bench_optim_{device.type}.png", f"{machine}; torch {torch.__version__}")


def hardware(device: torch.device | str) -> str:
    """Name the GPU, or the processor with its cores."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores, {processor()}"


def versions() -> str:
    """Name Python, torch, the commit and how noise is drawn."""
    code = f"commit {short_commit(git_commit() or 'unknown')}, noise version {NOISE_VERSION}"
    return f"Python {platform.python_version()}, torch {torch.__version__}, {code}"


def command() -> str:
    """Quote the command that was typed, without the folder that it wrote to."""
    words = sys.argv[1:]
    if "--output" in words:
        at = words.index("--output")
        del words[at : at + 2]
    return f"`python scripts/{shlex.join([Path(sys.argv[0]).name, *words])}`"


if __name__ == "__main__":
    main()
