"""Step time, bytes sent and optimizer state per rank of a private step on several ranks, compared with torch's DDP.

    python scripts/bench_distributed.py                                 # 1 and 2 ranks on this machine's cores
    python scripts/bench_distributed.py --worlds 1,2,4 --views 64

The global batch is the same for every number of ranks. DDP takes an ordinary, non-private step on the same model. Ranks
are processes of this machine with one thread each, over gloo; bytes are what a rank hands to its collective operations,
counted, in a step after the first.
"""

import argparse
import io
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from bench_optim import hardware, versions
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dpopt
from dpopt import models
from dpopt.training.cost import optimizer_state_bytes

PRIVATE, PLAIN = "dpopt, DP-Adam", "DDP, Adam"
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


def private_steps(traffic: Traffic, batch: int, steps: int) -> tuple[list[float], torch.optim.Optimizer]:
    """Take private steps; return their seconds."""
    inputs, targets = _examples(4 * batch)
    model = models.wrn_16_4()
    plan = dpopt.PrivacyPlan.calibrate(
        noise_multiplier=1.0, steps=steps, delta=1e-3, dataset_size=4 * batch, batch_size=batch, seed=0
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    private = dpopt.PrivateGradient(model, F.cross_entropy, plan, dpopt.clipping.Flat(1.0))
    seconds = []
    for samples in dpopt.poisson_batches((inputs, targets), plan, micro_batch=batch):
        _forget(traffic)
        began = time.perf_counter()
        private.backward(samples)
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    return seconds, optimizer


def plain_steps(traffic: Traffic, batch: int, steps: int) -> tuple[list[float], torch.optim.Optimizer]:
    """Take ordinary steps under DDP; return their seconds."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    model: nn.Module = models.wrn_16_4()
    if world > 1:
        wrapped = DistributedDataParallel(model)
        wrapped.register_comm_hook(None, traffic.hook)
        model = wrapped
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    seconds = []
    for _ in range(steps):
        inputs, targets = _examples(batch // world)
        _forget(traffic)
        began = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    return seconds, optimizer


VARIANTS = {PRIVATE: private_steps, PLAIN: plain_steps}


def _examples(count: int) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 32, 32, generator=draws), torch.randint(0, 10, (count,), generator=draws)


def _forget(traffic: Traffic) -> None:
    traffic.calls = traffic.bytes = 0


def _work(rank: int, world: int, folder: str, variant: str, batch: int, steps: int, answer: Connection) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if world > 1:
        store = dist.FileStore(f"{folder}/store", world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    traffic = Traffic()
    seconds, optimizer = VARIANTS[variant](traffic, batch, steps)
    kept = sorted(seconds[1:])
    row = {"variant": variant, "ranks": world, "seconds": kept[len(kept) // 2], "calls": traffic.calls}
    content = io.BytesIO()
    torch.save(row | {"bytes": traffic.bytes, "state": optimizer_state_bytes(optimizer)}, content)
    answer.send_bytes(content.getvalue())
    if world > 1:
        dist.destroy_process_group()


def bench(worlds: list[int], batch: int, steps: int) -> list[dict[str, Any]]:
    """Measure each variant with each number of ranks; return a row per measurement, of rank 0."""
    context = multiprocessing.get_context("forkserver")
    rows = []
    for variant in VARIANTS:
        for world in worlds:
            with tempfile.TemporaryDirectory() as folder:
                started = []
                for rank in range(world):
                    ours, theirs = context.Pipe()
                    process = context.Process(target=_work, args=(rank, world, folder, variant, batch, steps, theirs))
                    process.start()
                    theirs.close()
                    started.append((process, ours))
                found = [torch.load(io.BytesIO(answer.recv_bytes())) for _, answer in started]
                for process, _ in started:
                    process.join()
            rows.append(found[0])
    return rows


def markdown(rows: list[dict[str, Any]], batch: int) -> str:
    """Write the measurements as a page."""
    lines = [
        "# Several ranks",
        "",
        f"WRN-16-4, a global batch of {batch} 32 × 32 images, one thread per rank, gloo. Median of the steps after the",
        "first. Bytes are what a rank hands to collective operations in a step. DDP's step is not private.",
        "",
        "| step | ranks | seconds | collective operations | bytes per rank | state per rank |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['variant']} | {row['ranks']} | {row['seconds']:.2f} | {row['calls']} | {row['bytes']:,} "
            f"| {row['state']:,} |"
        )
    return "\n".join([*lines, "", f"{hardware('cpu')}, {versions()}", ""])


def main() -> None:
    """Measure, and print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", default="1,2", help="numbers of ranks")
    parser.add_argument("--batch", type=int, default=32, help="examples of the global batch")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--output", type=Path, help="a file for the page; by default it is printed")
    arguments = parser.parse_args()
    page = markdown(
        bench([int(w) for w in arguments.worlds.split(",")], arguments.batch, arguments.steps), arguments.batch
    )
    print(page)
    if arguments.output:
        arguments.output.write_text(page)


if __name__ == "__main__":
    main()
