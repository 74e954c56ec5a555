"""Several processes of one gloo group in a test, made quickly: a server that has imported everything forks them."""

import io
import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from datetime import timedelta
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection

import pytest
import torch
import torch.distributed as dist
from helpers import ROOT, configure

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["warm"])

BROKEN: list = [None]  # the mutant that every process applies to itself


@cache
def _start_server() -> None:
    """Start the server where it finds the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), str(ROOT)]))
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()


def _work(number: int, worlds: tuple[int, ...], folder: str, work, answer: Connection, broken) -> None:
    torch.set_num_threads(1)
    if broken is not None:
        broken(pytest.MonkeyPatch())
    try:
        found = {}
        for world in worlds:
            if number >= world:
                continue
            if world > 1:
                store = dist.FileStore(f"{folder}/{world}", world)
                dist.init_process_group(
                    "gloo", store=store, rank=number, world_size=world, timeout=timedelta(seconds=30)
                )
            found[world] = work(number, world)
            if world > 1:
                dist.destroy_process_group()
        content = io.BytesIO()
        torch.save(found, content)  # not by shared memory, which ends with this process
        answer.send_bytes(content.getvalue())
    except BaseException:
        answer.send_bytes(traceback.format_exc().encode())
        os._exit(1)  # the others notice


def _run(rank: int, world: int, port: int, overrides: tuple[str, ...], hurt, answer: Connection) -> None:
    from dpopt.training.run import run

    torch.set_num_threads(1)
    number = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in number.items()}, MASTER_ADDR="localhost")
    os.environ.update(MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if hurt is not None:
        hurt(rank)
    try:
        answer.send_bytes(run(configure(*overrides))["status"].encode())
    except BaseException as error:
        answer.send_bytes(f"{type(error).__name__}: {error}".encode())
        os._exit(1)


def run_at_ranks(world: int, *overrides: str, hurt=None) -> list[str]:
    """Train a run in a world of this size, as torchrun would; return each rank's status, error or `killed`.

    Args:
        world: number of ranks.
        overrides: of the configuration.
        hurt: called with its rank in every process, before the run.
    """
    _start_server()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(world):
        ours, theirs = CONTEXT.Pipe()
        started.append((CONTEXT.Process(target=_run, args=(rank, world, port, overrides, hurt, theirs)), ours))
        started[-1][0].start()
        theirs.close()
    told = []
    for process, answer in started:
        try:
            told.append(answer.recv_bytes().decode() if answer.poll(60) else "hangs")
        except EOFError:
            told.append("killed")
        process.join(5)
        process.kill()
    return told


def at_ranks(work, *worlds: int) -> dict[int, list]:
    """Call work(rank, world) on every rank of groups of these sizes; return the answers, by world and rank."""
    _start_server()
    with tempfile.TemporaryDirectory() as folder:
        processes, answers = [], []
        for number in range(max(worlds)):
            ours, theirs = CONTEXT.Pipe()
            processes.append(
                CONTEXT.Process(target=_work, args=(number, worlds, folder, work, theirs, BROKEN[0]), daemon=True)
            )
            processes[-1].start()
            theirs.close()
            answers.append(ours)
        raw = [answer.recv_bytes() for answer in answers]
        for process in processes:
            process.join()
    failures = [content.decode() for content in raw if content.startswith(b"Traceback")]
    assert not failures, "\n".join(failures)
    found = [torch.load(io.BytesIO(content), weights_only=False) for content in raw]
    return {world: [f[world] for f in found if world in f] for world in worlds}
