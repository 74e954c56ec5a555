"""Step time, bytes sent and optimizer state per rank of a private step on several ranks, compared with torch's DDP.

    python scripts/bench_distributed.py                                 # 1 and 2 ranks on this machine's cores
    python scripts/bench_distributed.py --worlds 1,2,4 --rounds 20

The global batch is the same for every number of ranks, and holds the same examples in every step. DDP takes an
ordinary, non-private step on the same model. All take turns, one step each, round by round, while the others sleep; a
figure is the median over the rounds, with the quartiles, and a ratio is the median of the ratios within a round. Ranks
are processes of this machine with one thread each, over gloo; bytes are what a rank hands to its collective operations,
counted.
"""

import argparse
import io
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from bench_engine import short, warn_if_busy
from bench_optim import command, hardware, versions
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dpopt
from dpopt import models
from dpopt.training.cost import keep_freed_memory, optimizer_state_bytes

PLAIN = "DDP, Adam"
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    PLAIN: torch.optim.Adam,
    "dpopt, DP-Adam": torch.optim.Adam,
    "dpopt, DP-MicroAdam": dpopt.optim.MicroAdam,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "wrn_16_4": models.wrn_16_4,
    "cnn": lambda: models.cnn(in_channels=3),
}
COLLECTIVES = ("all_reduce", "broadcast", "all_gather", "reduce_scatter_tensor", "all_gather_object")


class Traffic:
    """Counts the collective operations of this process, and the bytes that it hands to them."""

    def __init__(self) -> None:
        self.calls, self.bytes = 0, 0
        for name in COLLECTIVES:
            setattr(dist, name, self._counted(getattr(dist, name)))

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(value: Any, *arguments: Any, **options: Any) -> Any:
            self.note(value)
            return real(value, *arguments, **options)

        return call

    def note(self, value: Any) -> None:
        """Count one operation on a tensor."""
        self.calls += 1
        self.bytes += value.numel() * value.element_size() if isinstance(value, Tensor) else 0

    def hook(self, _: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Reduce a bucket of DDP as DDP does by itself, and count it."""
        self.note(bucket.buffer())
        buffer = bucket.buffer().div_(dist.get_world_size())
        work = dist.distributed_c10d.all_reduce(buffer, async_op=True)
        future: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
        return future


def private_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: int) -> Callable[[], None]:
    """Make a private step; every example is in every batch."""
    plan = dpopt.PrivacyPlan.calibrate(
        noise_multiplier=1.0, steps=10_000, delta=1e-5, dataset_size=batch, batch_size=batch, accountant="rdp", seed=0
    )
    private = dpopt.PrivateGradient(model, F.cross_entropy, plan, dpopt.clipping.Flat(1.0))
    share = -(-batch // (dist.get_world_size() if dist.is_initialized() else 1))  # no rank pads more
    batches = dpopt.poisson_batches(_examples(batch), plan, micro_batch=share)

    def step() -> None:
        private.backward(next(batches))
        optimizer.step()

    return step


def plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: int, traffic: "Traffic"
) -> Callable[[], None]:
    """Make an ordinary step, under DDP where there are several ranks."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    wrapped: nn.Module = model
    if world > 1:
        wrapped = DistributedDataParallel(model)
        wrapped.register_comm_hook(None, traffic.hook)
    inputs, targets = _examples(batch // world)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(wrapped(inputs), targets).backward()
        optimizer.step()

    return step


def _examples(count: int) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 32, 32, generator=draws), torch.randint(0, 10, (count,), generator=draws)


def _work(rank: int, row: dict[str, Any], folder: str, batch: int, orders: Connection) -> None:
    """Be a rank of a case: take a step for each order, and answer with its seconds and traffic."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()
    if row["ranks"] > 1:
        store = dist.FileStore(f"{folder}/store", row["ranks"])
        dist.init_process_group("gloo", store=store, rank=rank, world_size=row["ranks"])
    traffic = Traffic()
    model = MODELS[row["model"]]()
    optimizer = OPTIMIZERS[row["variant"]](model.parameters(), lr=1e-3)
    plain = row["variant"] == PLAIN
    step = plain_step(model, optimizer, batch, traffic) if plain else private_step(model, optimizer, batch)
    while orders.recv_bytes() == b"step":
        traffic.calls = traffic.bytes = 0
        began = time.perf_counter()
        step()
        found = {"seconds": time.perf_counter() - began, "calls": traffic.calls, "bytes": traffic.bytes}
        content = io.BytesIO()
        torch.save(found | {"state": optimizer_state_bytes(optimizer)}, content)
        orders.send_bytes(content.getvalue())
    if row["ranks"] > 1:
        dist.destroy_process_group()


def bench(model: str, worlds: list[int], batch: int, rounds: int, variants: list[str]) -> list[dict[str, Any]]:
    """Measure each variant with each number of ranks; return a row per case, of rank 0."""
    context = multiprocessing.get_context("forkserver")
    rows: list[dict[str, Any]]
    rows = [{"model": model, "variant": variant, "ranks": world} for variant in variants for world in worlds]
    times: list[list[float]] = [[] for _ in rows]
    with tempfile.TemporaryDirectory() as folder:
        cases, started = [], []
        for number, row in enumerate(rows):
            Path(f"{folder}/{number}").mkdir()
            pipes = [context.Pipe() for _ in range(row["ranks"])]
            for rank, (_, theirs) in enumerate(pipes):
                started.append(context.Process(target=_work, args=(rank, row, f"{folder}/{number}", batch, theirs)))
                started[-1].start()
                theirs.close()
            cases.append([ours for ours, _ in pipes])
        for number in range(rounds + 2):  # the first two validate and measure what is fastest
            for row, ranks, seconds in zip(rows, cases, times, strict=True):
                for orders in ranks:
                    orders.send_bytes(b"step")
                found, *_ = [torch.load(io.BytesIO(answer.recv_bytes())) for answer in ranks]
                row.update(found)
                if number >= 2:
                    seconds.append(found["seconds"])
        for orders in (orders for ranks in cases for orders in ranks):
            orders.send_bytes(b"end")
        for process in started:
            process.join()
    return [row | _summary(row, rows, times) for row in rows]


def _summary(row: dict[str, Any], rows: list[dict[str, Any]], times: list[list[float]]) -> dict[str, Any]:
    """Summarize a row's times, and compare them with the same step on the fewest ranks and with DDP on as many."""
    own = times[rows.index(row)]

    def ratio(**about: Any) -> float | None:
        """Return the median ratio to the first row like this one but for `about`."""
        like = {"variant": row["variant"], "ranks": row["ranks"]} | about
        for other, theirs in zip(rows, times, strict=True):
            if like == {"variant": other["variant"], "ranks": other["ranks"]}:
                return statistics.median(a / b for a, b in zip(own, theirs, strict=True))
        return None

    low, seconds, high = statistics.quantiles(own, n=4)
    fewest = min(other["ranks"] for other in rows)
    return {"low": low, "seconds": seconds, "high": high} | {
        "to_fewest": ratio(ranks=fewest),
        "to_plain": ratio(variant=PLAIN),
        "fewest": fewest,
    }


def markdown(rows: list[dict[str, Any]], header: str) -> str:
    """Write the measurements as a page."""
    lines = [
        header,
        "",
        f"| step | ranks | ms, median (quartiles) | ratio to {rows[0]['fewest']} | ratio to DDP "
        "| collective operations | bytes per rank | state per rank |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        spread = f"{1e3 * row['seconds']:.4g} ({1e3 * row['low']:.4g}–{1e3 * row['high']:.4g})"
        ratios = ["" if value is None else f"{value:.2f}" for value in (row["to_fewest"], row["to_plain"])]
        sizes = [f"{row[name]:,}" for name in ("calls", "bytes", "state")]
        lines.append(f"| {' | '.join([row['variant'], str(row['ranks']), spread, *ratios, *sizes])} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wrn_16_4", choices=list(MODELS))
    parser.add_argument("--worlds", default="1,2", help="numbers of ranks")
    parser.add_argument("--batch", type=int, default=32, help="examples of the global batch")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--output", type=Path, default=Path("experiments/results/benchmarks"), help="folder of the page"
    )
    arguments = parser.parse_args()
    warn_if_busy()
    worlds = [int(world) for world in arguments.worlds.split(",")]
    rows = bench(arguments.model, worlds, arguments.batch, arguments.rounds, list(OPTIMIZERS))
    machine = hardware("cpu")
    parameters = sum(p.numel() for p in MODELS[arguments.model]().parameters())
    header = (
        f"# Several ranks\n\n{machine}, gloo, one thread per rank; {versions()}. "
        f"{command()}: {arguments.rounds} rounds, all in turn.\n"
        f"{arguments.model}, {parameters:,} parameters, a global batch of {arguments.batch} 32 × 32 images. Ratios are "
        "medians within a round. DDP's step is not\nprivate. Bytes are what a rank hands to collective operations in a "
        "step."
    )
    page = markdown(rows, header)
    print(page)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / f"bench_distributed_{short(machine)}.md").write_text(page)


if __name__ == "__main__":
    main()
