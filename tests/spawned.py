"""Several processes of one gloo group in a test, made quickly: a server that has imported everything forks them."""

import io
import multiprocessing
import os
import tempfile
import traceback
from datetime import timedelta
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection

import pytest
import torch
import torch.distributed as dist
from helpers import ROOT

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
