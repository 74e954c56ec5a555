"""Time and memory of one private gradient, from a batch to the clipped sum, compared with an ordinary gradient.

    python scripts/bench_engine.py                                       # this machine; CUDA where there is a GPU
    python scripts/bench_engine.py --models wrn_16_4 --views 1 --rounds 20

Every variant has its own process, so that none profits or suffers from the memory of another; they take turns, one
step each, round by round, while the others sleep. A figure is the median over the rounds, with the quartiles, and a
ratio is the median of the ratios to the plain step within a round. Settings with more augmented views per example have
fewer examples: the number of views is the same. Memory is the peak of four steps minus what model and batch take.
"""

import argparse
import importlib.util
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_optim import command, hardware, versions
from bench_others import jax_privacy_step, opacus_step, opake_step
from torch import nn

from dpopt import models
from dpopt.grad_sample.engine import GradSampler
from dpopt.grad_sample.validate import validate_against_autograd
from dpopt.models.layers import StandardizedConv2d
from dpopt.privacy.clipping import Flat
from dpopt.training.cost import keep_freed_memory, peak_memory_bytes, reset_peak_memory

PLAIN = "not private"
VARIANTS = {
    PLAIN: None,
    "dpopt": "auto",
    "dpopt, store": "store",
    "dpopt, recompute": "recompute",
    "dpopt, memory=0": "least auto",
    "dpopt, vmap": "vmap",
    "dpopt, compiled": "compiled auto",
    "Opacus, hooks": "hooks",
    "Opacus, ghost": "ghost",
    "Opake": "opake",  # pip install opake==0.16.0
    "JAX-Privacy": "jax_privacy",  # pip install jax-privacy==2.0.0
}


def plain_convolutions(module: nn.Module) -> nn.Module:
    """Replace the standardized convolutions of a model by ordinary ones."""
    for name, child in list(module.named_children()):
        if isinstance(child, StandardizedConv2d):
            kernel, stride = child.kernel_size[0], child.stride[0]
            setattr(module, name, nn.Conv2d(child.in_channels, child.out_channels, kernel, stride, kernel // 2))
        else:
            plain_convolutions(child)
    return module


# Model, image size, views in a batch.
MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "wrn_16_4": (lambda: plain_convolutions(models.wrn_16_4()), 32, 32),
    "wrn_16_4_ws": (models.wrn_16_4, 32, 32),
    "nf_resnet50": (models.nf_resnet50, 64, 16),
    "deit_tiny": (lambda: models.deit_tiny(pretrained=False, zero_head=False), 224, 16),
    "cnn": (lambda: models.cnn(in_channels=3), 32, 256),
}
GPU_VIEWS = {"wrn_16_4": 2048, "wrn_16_4_ws": 2048, "nf_resnet50": 512, "deit_tiny": 512, "cnn": 8192}


PRECISION = "fp32"  # of all variants; set by --precision


def autocast(device: torch.device) -> torch.autocast:
    """Autocast to bf16, or none."""
    return torch.autocast(device.type, torch.bfloat16, enabled=PRECISION == "bf16")


def make_step(variant: str, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """Make one step from (B, K, …) inputs to the clipped sum, by a variant."""
    how = VARIANTS[variant]
    if how is None:
        return plain_step(model, x, y)
    if how == "opake":
        return opake_step(model, x, y, autocast)
    if how == "jax_privacy":
        return jax_privacy_step(model, x, y, autocast)
    return opacus_step(how, model, x, y, autocast) if how in ("hooks", "ghost") else private_step(how, model, x, y)


def plain_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """Make an ordinary forward and backward pass."""
    flat, labels = x.flatten(0, 1), y.repeat_interleave(x.shape[1])

    def step() -> None:
        model.zero_grad()
        with autocast(x.device):
            loss = F.cross_entropy(model(flat), labels)
        loss.backward()

    return step


def private_step(how: str, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """Make dpopt's per-sample gradients and their clipped sum."""
    clip = Flat(1.0)
    policy, compiled = how.split()[-1], how.startswith("compiled")
    memory = 0 if how.startswith("least") else None
    engine = GradSampler(model, F.cross_entropy, policy, memory, PRECISION, compiled)
    validate_against_autograd(engine, x, y)
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    def private() -> None:
        for total in sums.values():
            total.zero_()
        per_sample = engine(x, y)
        per_sample.add_weighted_sum(sums, clip.weight(per_sample.norms))

    return private


def work(model_name: str, variant: str, views: int, total: int, device: str) -> None:
    """Measure one variant: print its peak memory, then a time per line read."""
    keep_freed_memory()
    torch.manual_seed(0)
    make, size, _ = MODELS[model_name]
    model = make().to(device)
    x = torch.randn(total // views, views, 3, size, size, device=device)
    y = torch.randint(0, 10, (total // views,), device=device)
    where = torch.device(device)
    before = torch.cuda.memory_allocated() if where.type == "cuda" else resident()
    serve(lambda: make_step(variant, model, x, y), where, before)


def serve(make: Callable[[], Callable[[], None]], where: torch.device, before: int) -> None:
    """Say the peak memory of the step that `make` makes, without what was there before, then a time for every line."""
    try:
        step = make()
        step()  # measures what is fastest
        reset_peak_memory(where)
        for _ in range(4):  # freed memory is not always fit for what comes next: the first step may need less
            step()
        peak = peak_memory_bytes(where) - before
    except Exception as error:  # whatever it is, the row says so
        print(f"failed {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
        return
    print(f"peak {peak}", flush=True)
    for _ in sys.stdin:
        if where.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if where.type == "cuda":
            torch.cuda.synchronize()
        print(f"time {time.perf_counter() - start}", flush=True)


def warn_if_busy() -> None:
    """Print a warning if other processes would disturb the times."""
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"warning: the load of this machine is {load:.1f}; wait until it is quiet")


def resident() -> int:
    """Bytes of memory that the process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def bench(
    model: str, views: int, total: int, device: str, rounds: int, variants: list[str], script: str = __file__
) -> list[dict]:
    """One row per variant, each in a process of a script that says `peak` and `time` as `work` does."""
    command = [sys.executable, script, "--device", device, "--precision", PRECISION, "--worker"]
    workers, rows = {}, {}
    for variant in variants:
        arguments = [model, variant, str(views), str(total)]
        worker = subprocess.Popen(
            command + arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        said = _hear(worker)
        row = {"model": model, "views": views, "total": total, "variant": variant}
        if said.startswith("peak"):
            workers[variant] = worker
            row["peak"] = int(said.split()[1])
        else:
            row["failed"] = said.removeprefix("failed ") or "died"
            worker.communicate()
        rows[variant] = row
    times: dict[str, list[float]] = {variant: [] for variant in workers}
    for number in range(rounds + 1):  # the first is not counted
        for variant, worker in workers.items():
            assert worker.stdin is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
            said = _hear(worker)
            if number and said.startswith("time"):
                times[variant].append(float(said.split()[1]))
    for variant, worker in workers.items():
        worker.communicate()
        quartiles = statistics.quantiles(times[variant], n=4)
        ratios = [a / b for a, b in zip(times[variant], times[PLAIN], strict=True)]
        rows[variant] |= {"seconds": quartiles[1], "low": quartiles[0], "high": quartiles[2]}
        rows[variant] |= {"ratio": statistics.median(ratios)}
    return list(rows.values())


def short(machine: str) -> str:
    """Name the processor or GPU in a file's name."""
    words = re.sub(r"\(r\)|\(tm\)|@.*|\d+ cpu cores|processor", " ", machine.lower())
    return "_".join(re.findall(r"[a-z0-9]+", words))


def _hear(worker: subprocess.Popen) -> str:
    """Read the worker's next word, past whatever libraries print."""
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.startswith(("peak ", "time ", "failed ")):
            return line.strip()
    return ""


def markdown(rows: list[dict], header: str) -> str:
    """Write the table of one machine."""
    lines = [header, ""]
    for setting in dict.fromkeys((row["model"], row["views"]) for row in rows):
        chosen = [row for row in rows if (row["model"], row["views"]) == setting]
        total = chosen[0]["total"]
        lines += [f"## {setting[0]}: {total // setting[1]} examples, K = {setting[1]}", ""]
        lines += [
            "| | ms, median (quartiles) | ratio | examples/s | views/s | peak, MB |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for row in chosen:
            if "failed" in row:
                lines.append(f"| {row['variant']} | {row['failed'][:70]} | | | | |")
                continue
            spread = f"{1e3 * row['seconds']:.4g} ({1e3 * row['low']:.4g}–{1e3 * row['high']:.4g})"
            speed = total / row["seconds"]
            lines.append(
                f"| {row['variant']} | {spread} | {row['ratio']:.2f} | {speed / setting[1]:,.1f} | {speed:,.1f} | "
                f"{row['peak'] / 1e6:,.0f} |"
            )
        lines.append("")
    return "\n".join(lines)


def figure(rows: list[dict], path: Path, title: str) -> None:
    """Draw ratios to the plain step, a panel per model.

    Each number of views has a group of bars.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "ratio" in row and row["variant"] != PLAIN]
    names = list(dict.fromkeys(row["model"] for row in rows))
    labels = list(dict.fromkeys(row["variant"] for row in rows))
    palette = ["#0072B2", "#56B4E9", "#009E73", "#999999", "#D55E00", "#E69F00", "#CC79A7", "#F0E442", "#000000"]
    colors = dict(zip(labels, palette, strict=False))
    fig, axes = plt.subplots(1, len(names), figsize=(1.5 + 2.9 * len(names), 3.4), squeeze=False)
    for ax, name in zip(axes[0], names, strict=True):
        counts = sorted({row["views"] for row in rows if row["model"] == name})
        for row in (row for row in rows if row["model"] == name):
            at = counts.index(row["views"]) + (labels.index(row["variant"]) - len(labels) / 2 + 0.5) * 0.8 / len(labels)
            ax.bar(at, row["ratio"], 0.8 / len(labels), color=colors[row["variant"]])
        ax.axhline(1, color="black", linewidth=0.8)
        ax.set_xticks(range(len(counts)), [f"K = {count}" for count in counts])
        ax.set_title(name, fontsize=10)
        ax.grid(alpha=0.3, axis="y")
        ax.set_axisbelow(True)
    axes[0][0].set_ylabel("time of a step / plain step")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colors[label]) for label in labels]
    fig.legend(handles, labels, ncol=len(labels), loc="lower center", fontsize=8, frameon=False)
    fig.suptitle(f"A private gradient compared with an ordinary one, at equal views. {title}", fontsize=9)
    fig.tight_layout(rect=(0, 0.07, 1, 1))
    fig.savefig(path, dpi=150)


def main() -> None:
    """Measure, print, and write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--views", nargs="+", type=int, default=[1, 4, 16], help="augmented views per example, K")
    ready = [name for name in VARIANTS if "compiled" not in name]  # minutes to compile
    for variant, package in (("Opake", "opake"), ("JAX-Privacy", "jax_privacy")):
        if importlib.util.find_spec(package) is None:
            ready.remove(variant)
    parser.add_argument("--variants", nargs="+", default=ready, choices=list(VARIANTS))
    parser.add_argument("--total", type=int, help="views in a batch, instead of each model's own number")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="fp32 on a CPU, bf16 on a GPU unless said")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--output", type=Path, default=Path("experiments/results/benchmarks"), help="folder of table and figure"
    )
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    global PRECISION
    PRECISION = arguments.precision or ("bf16" if torch.device(arguments.device).type == "cuda" else "fp32")
    if arguments.worker:
        model, variant, views, total = arguments.worker
        work(model, variant, int(views), int(total), arguments.device)
        return
    warn_if_busy()
    variants = [PLAIN, *(v for v in arguments.variants if v != PLAIN)]
    kind = torch.device(arguments.device).type
    rows = []
    for model in arguments.models:
        for views in arguments.views:
            total = arguments.total or (GPU_VIEWS[model] if kind == "cuda" else MODELS[model][2])
            rows += bench(model, views, total, arguments.device, arguments.rounds, variants)
            print(markdown([r for r in rows if (r["model"], r["views"]) == (model, views)], ""), flush=True)
    machine = hardware(arguments.device)
    name = f"bench_engine_{kind}_{short(machine)}_{PRECISION}"
    header = (
        f"# A private gradient compared with an ordinary one\n\n{machine}, {PRECISION}; {versions()}. {command()}: "
        f"{arguments.rounds} rounds, all variants in turn.\nRatios to the plain step are medians within a round.\n\n"
        f"![]({name}.png)"
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / f"{name}.md").write_text(markdown(rows, header))
    figure(rows, arguments.output / f"{name}.png", f"{machine}, {PRECISION}; torch {torch.__version__}")


if __name__ == "__main__":
    main()
