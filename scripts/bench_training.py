"""Examples per second and peak memory of the whole training step: per-example gradients, clip, noise and optimizer.

    python scripts/bench_training.py                                    # this machine; CUDA where there is a GPU
    python scripts/bench_training.py --models wrn_16_4 --rounds 20

DP-Adam and DP-MicroAdam are compared with each other and with Adam without privacy, each in its own process; they
take turns, one step each, round by round. A ratio is the median of the ratios to Adam within a round. Memory is the
peak of four steps minus what the process has before the model is made: weights, gradients, sums and state count.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_engine import PLAIN, bench, markdown, resident, serve, short
from bench_optim import command, hardware, versions
from bench_text import SMOLLM2
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import dpopt
from dpopt import models
from dpopt.tasks.language_modeling import mean_losses
from dpopt.training.cost import keep_freed_memory, optimizer_state_bytes

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    PLAIN: torch.optim.Adam,
    "MicroAdam, not private": dpopt.optim.MicroAdam,
    "DP-Adam": torch.optim.Adam,
    "DP-MicroAdam": dpopt.optim.MicroAdam,
    "DP-SGD": torch.optim.SGD,
}
# Model, image size (tokens of a text), examples in a batch on a CPU and on a GPU, policy of the engine.
MODELS: dict[str, tuple[Callable[[], nn.Module], int, int, int, str]] = {
    "wrn_16_4": (models.wrn_16_4, 32, 32, 2048, "auto"),
    "deit_base": (lambda: models.deit_base(pretrained=False, zero_head=False), 224, 4, 256, "auto"),
    "vit_150m": (lambda: VisionTransformer(112, 16, embed_dim=1024, depth=12, num_heads=16), 112, 2, 128, "ghost"),
    "smollm2": (lambda: models.transformer(config=SMOLLM2), 64, 2, 64, "ghost"),
}


def work(name: str, variant: str, total: int, device: str) -> None:
    """Measure one variant in a process of `bench`."""
    keep_freed_memory()
    torch.manual_seed(0)
    make, size, _, _, policy = MODELS[name]
    where = torch.device(device)
    inputs = torch.randn(total, 3, size, size, device=where)
    targets = torch.randint(0, 10, (total,), device=where)
    loss_fn: Callable[..., torch.Tensor] = F.cross_entropy
    if name == "smollm2":
        inputs = torch.randint(0, 20_000, (total, size), device=where)
        targets, loss_fn = inputs.roll(-1, 1), lambda outputs, next_ones: mean_losses(outputs, next_ones).mean()
    before = torch.cuda.memory_allocated() if where.type == "cuda" else resident()

    def step() -> Callable[[], None]:
        model = make().to(where)
        optimizer = OPTIMIZERS[variant](model.parameters(), lr=1e-3)
        return private(model, optimizer) if variant.startswith("DP") else plain(model, optimizer)

    def plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        def call() -> None:
            optimizer.zero_grad()
            with autocast(where):
                loss = loss_fn(model(inputs), targets)
            loss.backward()
            optimizer.step()

        return call

    def private(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        # Every example in every batch: all steps are alike.
        plan = dpopt.PrivacyPlan.calibrate(
            delta=1e-5, noise_multiplier=1.0, accountant="rdp", seed=0, dataset_size=total, batch_size=total, steps=1000
        )
        clip = dpopt.clipping.Flat(1.0)
        gradient = dpopt.PrivateGradient(model, loss_fn, plan, clip, precision=precision(where), engine=policy)
        batches = dpopt.poisson_batches((inputs, targets), plan, micro_batch=total)

        def call() -> None:
            gradient.backward(next(batches))
            optimizer.step()

        return call

    serve(step, where, before)


def state_per_parameter(name: str) -> str:
    """Say how many bytes of state each optimizer keeps per parameter, after a step."""
    model = MODELS[name][0]()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    found = []
    for label in ("DP-Adam", "DP-MicroAdam"):
        optimizer = OPTIMIZERS[label](model.parameters(), lr=0.0)
        optimizer.step()
        found.append(f"{optimizer_state_bytes(optimizer) / sum(p.numel() for p in model.parameters()):.2f}")
    return f"{name} {found[0]} and {found[1]}"


def precision(where: torch.device) -> str:
    """bf16 on a GPU."""
    return "bf16" if where.type == "cuda" else "fp32"


def autocast(where: torch.device) -> torch.autocast:
    """Choose the precision of an ordinary step."""
    return torch.autocast(where.type, torch.bfloat16, enabled=precision(where) == "bf16")


def main() -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--precision", help=argparse.SUPPRESS)
    parser.add_argument(
        "--output", type=Path, default=Path("experiments/results/benchmarks"), help="folder of the table"
    )
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        name, variant, _, total = arguments.worker
        work(name, variant, int(total), arguments.device)
        return
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"warning: the load of this machine is {load:.1f}; wait until it is quiet")
    rows, sizes, states = [], [], []
    for name in arguments.models:
        _, _, on_cpu, on_gpu, _ = MODELS[name]
        total = on_gpu if arguments.device.startswith("cuda") else on_cpu
        rows += bench(name, 1, total, arguments.device, arguments.rounds, list(OPTIMIZERS), __file__)
        with torch.device("meta"):
            sizes.append(f"{name} {sum(p.numel() for p in MODELS[name][0]().parameters()) / 1e6:,.1f} M")
        states.append(state_per_parameter(name))
        print(markdown([row for row in rows if row["model"] == name], ""), flush=True)
    machine = hardware(arguments.device)
    header = (
        f"# The whole training step\n\n{machine}, {precision(torch.device(arguments.device))}; {versions()}. "
        f"{command()}: {arguments.rounds} rounds, all variants in "
        f"turn. Parameters: {', '.join(sizes)}; vit_150m and smollm2 "
        "by ghost norms.\nState in bytes per parameter, Adam and MicroAdam: "
        f"{'; '.join(states)}.\nNot private is Adam; ratios to it are "
        "medians within a round. The peak holds weights, gradients, sums and optimizer state."
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    part = "" if set(arguments.models) == set(MODELS) else "_".join(["", *arguments.models])
    kind = torch.device(arguments.device).type
    (arguments.output / f"bench_training_{kind}_{short(machine)}{part}.md").write_text(markdown(rows, header))


if __name__ == "__main__":
    main()
