"""Time and memory of one private gradient of a transformer, compared with an ordinary one and with other libraries.

    python scripts/bench_text.py
    python scripts/bench_text.py --models minilm --rounds 15

Weights are random, shapes are those of the published models; texts have lengths from 8 tokens to all of them. Processes
take turns as in bench_engine.py. Opacus and Opake classify only: their losses know no masked targets here.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_engine
import torch
import torch.nn.functional as F
from bench_engine import PLAIN, bench, markdown, serve, short, warn_if_busy
from bench_optim import command, hardware, versions
from bench_others import opacus_step, opake_step
from torch import nn

from dpopt.data.datasets import DataSpec
from dpopt.grad_sample.engine import GradSampler
from dpopt.grad_sample.validate import validate_against_autograd
from dpopt.models import transformer
from dpopt.privacy.clipping import Flat
from dpopt.tasks import LanguageModeling
from dpopt.training.cost import keep_freed_memory

MINILM = {"model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
SMOLLM2 = {
    **{"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
    **{"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
}
# Configuration, part that is trained, classes (None: language modeling), examples, tokens.
MODELS: dict[str, tuple[dict[str, Any], Any, int | None, int, int]] = {
    "minilm": (MINILM, "full", 2, 8, 64),
    "minilm_lora": (MINILM, "lora", 2, 8, 64),
    "smollm2_lora": (SMOLLM2, "lora", None, 4, 100),
    "smollm2_full": (SMOLLM2, "full", None, 4, 100),
}
VARIANTS = (PLAIN, "dpopt", "Opacus, hooks", "Opacus, ghost", "Opake")


def make_step(variant: str, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """Make one step from tokens (B, 1, T) to the clipped sum, by a variant."""
    loss_fn: Callable[..., Any] = F.cross_entropy
    if y.ndim > 1:
        loss_fn = LanguageModeling(DataSpec("text", 1, 0, tuple(y.shape[1:]), lambda *_: (None, None))).loss_fn
        if variant not in (PLAIN, "dpopt"):
            raise ValueError("classifies only")
    if variant == "Opake":
        return opake_step(model, x, y, bench_engine.autocast)
    if variant.startswith("Opacus"):
        return opacus_step(variant.split()[1], model, x, y, bench_engine.autocast)
    if variant == PLAIN:

        def plain() -> None:
            model.zero_grad()
            with bench_engine.autocast(x.device):
                loss = loss_fn(model(x[:, 0]), y)
            loss.backward()

        return plain
    engine, clip = GradSampler(model, loss_fn, precision=bench_engine.PRECISION), Flat(1.0)
    validate_against_autograd(engine, x[:2], y[:2])
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}

    def private() -> None:
        for total in sums.values():
            total.zero_()
        per_sample = engine(x, y)
        per_sample.add_weighted_sum(sums, clip.weight(per_sample.norms))

    return private


def work(name: str, variant: str, device: str) -> None:
    """Measure one variant: print its peak memory, then a time per line read."""
    keep_freed_memory()
    torch.manual_seed(0)
    config, train, classes, examples, length = MODELS[name]
    model = transformer(config=config, train=train, pooling="mean" if classes else None, num_classes=classes).to(device)
    x = torch.randint(0, 20_000, (examples, 1, length), device=device)
    for row, end in zip(x, torch.linspace(8, length, examples).long().tolist(), strict=True):
        row[:, end:] = -1
    following = x[:, 0].roll(-1, 1)
    absent = (x[:, 0] < 0) | (following < 0)
    y = torch.arange(examples, device=device) % classes if classes else following.masked_fill(absent, -100)
    where = torch.device(device)
    before = torch.cuda.memory_allocated() if where.type == "cuda" else bench_engine.resident()
    serve(lambda: make_step(variant, model, x, y), where, before)


def main() -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--output", type=Path, default=Path("experiments/results/benchmarks"), help="folder of the table"
    )
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    bench_engine.PRECISION = arguments.precision
    if arguments.worker:
        work(arguments.worker[0], arguments.worker[1], arguments.device)
        return
    warn_if_busy()
    rows = []
    for name in arguments.models:
        variants = [PLAIN, *(v for v in arguments.variants if v != PLAIN)]
        rows += bench(name, 1, MODELS[name][3], arguments.device, arguments.rounds, variants, __file__)
        print(markdown([row for row in rows if row["model"] == name], ""), flush=True)
    machine = hardware(arguments.device)
    name = f"bench_text_{torch.device(arguments.device).type}_{short(machine)}_{arguments.precision}"
    header = (
        f"# A private gradient of a transformer compared with an ordinary one\n\n{machine}, {arguments.precision}; "
        f"{versions()}. {command()}: {arguments.rounds} rounds, all "
        "variants in turn.\nRatios to the plain step are medians within a round. Random weights, texts of 8 to 64 "
        "tokens (MiniLM)\nand of 8 to 100 (SmolLM2-135M), padded to the longest."
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / f"{name}.md").write_text(markdown(rows, header))


if __name__ == "__main__":
    main()
