"""The process group of a run that `torchrun` started: set up in this one place, watched, and taken down.

Each rank holds a TCP connection to rank 0. The system closes it when a process ends, however it ends, so that a killed
rank is noticed at once, where a collective operation could wait for hours. A machine that vanishes is noticed by TCP's
keepalive within half a minute. The connections carry one message, when a rank ends: that it is done, or why it is not.
A rank also ends when torchrun, which started it, is killed: it would go on alone, and hold the run directory.
"""

import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist

_DONE = b"done"
_START, _PATIENCE = timedelta(minutes=5), timedelta(hours=2)  # for all to come; for rank 0 to evaluate, say
_ANSWER = timedelta(seconds=15)  # for torchrun's store, which is there before the ranks
_GRACE = 10.0  # seconds for an orderly end after another rank has stopped
_ADVICE = "the same command continues from the last checkpoint"
_KEY = "dpopt/watch"


class RankLost(OSError):
    """Another rank has stopped; the watch has printed the sentence already."""

    told = True


def world_size() -> int:
    """Return the number of processes that were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def process_group(device: str) -> Iterator["Watch | None"]:
    """Join the other ranks, if there are any; leave them in order, or tell them why not.

    Args:
        device: of the configuration.

    Raises:
        ValueError: for a device that ranks cannot share.
        OSError: when torchrun's store does not answer; RankLost when another rank has stopped.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_launcher()
    if world_size() == 1 or dist.is_initialized():
        yield None
        return
    backend = _backend(device)
    store, rank, world = _meet()
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_PATIENCE)
    watch = Watch(store, rank, world)
    left = False
    try:
        yield watch
        watch.close(None)
        left = True
    except BaseException as error:
        watch.close(f"rank {rank} on {socket.gethostname()} has stopped: {error or type(error).__name__}")
        if isinstance(error, ValueError | OSError) and watch.says_the_same(error):
            raise SystemExit(1) from error
        raise
    finally:
        if left or backend == "gloo":  # NCCL might wait for the ranks that have stopped
            dist.destroy_process_group()


@cache
def _end_with_launcher() -> None:
    """End this process as soon as the one that started it has ended, however that ended."""
    launcher = os.getppid()

    def wait() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        rank = os.environ.get("RANK", "0")
        _say(f"torchrun, which started rank {rank} on {socket.gethostname()}, was killed")
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _meet() -> tuple[dist.Store, int, int]:
    """Find the group's store, this process's rank and the number of ranks.

    Raises:
        OSError: when torchrun was killed before this process has found its store.
    """
    started_before = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store, rank, world = next(iter(dist.rendezvous("env://", timeout=_ANSWER if started_before else _START)))
    except dist.DistNetworkError as error:
        at = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise OSError(f"the other ranks cannot be found at {at}, torchrun may have been killed: {_ADVICE}") from error
    store.set_timeout(_START)
    return store, rank, world


def _backend(device: str) -> str:
    """Choose the backend for a device, and this rank's GPU.

    Raises:
        ValueError: for one GPU that is named for all ranks, or more ranks than GPUs.
    """
    if device == "cpu" or not torch.cuda.is_available():
        return "gloo"
    local, ranks, gpus = local_rank(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if device not in ("auto", "cuda"):
        raise ValueError(f"device={device} is one device for {world_size()} ranks: leave device=auto, a GPU per rank")
    if ranks > gpus:
        raise ValueError(f"{ranks} ranks do not fit {gpus} GPUs: set --nproc-per-node={gpus}, or device=cpu")
    torch.cuda.set_device(local)
    return "nccl"


def local_rank() -> int:
    """Return the number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


class Watch:
    """Notices that another rank has ended before its time.

    Args:
        store: where rank 0 says how it can be reached.
        rank: of this process.
        world: number of ranks.

    Attributes:
        lost: which rank has stopped, and why, in a sentence; empty while all work.
    """

    def __init__(self, store: dist.Store, rank: int, world: int) -> None:
        self.rank, self.lost = rank, ""
        self._noticed, self._leaving, self._told = threading.Event(), threading.Event(), threading.Lock()
        self._hosts: dict[int, str] = {}
        self._peers = self._accept(store, world) if rank == 0 else {0: self._connect(store)}
        for peer in self._peers.values():
            _keep_alive(peer)
        threading.Thread(target=self._listen, daemon=True).start()

    def explained(self, error: Exception) -> Exception:
        """Turn the error of a collective operation into the one that names the rank that has stopped."""
        if isinstance(error, RuntimeError) and self._noticed.wait(_GRACE / 2):
            self._tell()
            return RankLost(self.lost)
        return error

    def says_the_same(self, error: Exception) -> bool:
        """Tell whether rank 0 has stopped for the same reason as this rank, and prints it."""
        heard = self.rank > 0 and self._noticed.wait(_GRACE / 5)
        return heard and self.lost.startswith("rank 0 ") and self.lost.endswith(f": {error}")

    def close(self, reason: str | None) -> None:
        """Tell the other ranks that this one is done, or why it stops, and hang up."""
        self._leaving.set()
        for peer in self._peers.values():
            _send(peer, _DONE if reason is None else (self.lost or reason).encode())

    def _accept(self, store: dist.Store, world: int) -> dict[int, socket.socket]:
        """Let the other ranks connect, each with the word that only the group's store knows."""
        peers: dict[int, socket.socket] = {}
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        with socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=world) as server:
            server.settimeout(_START.total_seconds())
            word, host = secrets.token_hex(16), socket.gethostname()
            store.set(_KEY, f"{os.environ.get('MASTER_ADDR', 'localhost')} {server.getsockname()[1]} {word} {host}")
            while len(peers) < world - 1:
                peer, _ = server.accept()
                said, _, about = _read_line(peer).partition(" ")
                number, _, host = about.partition(" ")
                if secrets.compare_digest(said, word):
                    peers[int(number)], self._hosts[int(number)] = peer, host
        return peers

    def _connect(self, store: dist.Store) -> socket.socket:
        address, port, word, self._hosts[0] = store.get(_KEY).decode().split(" ")
        peer = socket.create_connection((address, int(port)), timeout=_START.total_seconds())
        peer.settimeout(None)
        peer.sendall(f"{word} {self.rank} {socket.gethostname()}\n".encode())
        return peer

    def _listen(self) -> None:
        """Wait for what the others say at their end."""
        with selectors.DefaultSelector() as selector:
            for rank, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    said = _read_all(self._peers[key.data])
                    selector.unregister(key.fileobj)
                    if said != _DONE and not self._noticed.is_set():
                        killed = f"rank {key.data} on {self._hosts[key.data]} was killed or is lost"
                        self._stop(said.decode() or killed, not said)

    def _stop(self, sentence: str, killed: bool) -> None:
        """Note which rank has stopped, pass it on, and see to it that this process ends."""
        self.lost = sentence
        self._noticed.set()
        if self.rank == 0:
            for peer in self._peers.values():
                _send(peer, sentence.encode())
        if not self._leaving.is_set():
            threading.Thread(target=self._end, args=(killed,), daemon=True).start()

    def _end(self, killed: bool) -> None:
        """End this process even where it waits inside a collective operation."""
        if killed or not self._leaving.wait(_GRACE / 5):  # ranks often stop for one reason, each by itself
            self._tell()
        time.sleep(_GRACE)
        os._exit(1)

    def _tell(self) -> None:
        """Print, once, which rank has stopped."""
        if self._told.acquire(blocking=False):
            _say(self.lost)


def _say(reason: str) -> None:
    """Print why this process ends; nobody may be left to read it."""
    with contextlib.suppress(OSError, ValueError):
        print(f"dpopt: {reason}; {_ADVICE}", file=sys.stderr, flush=True)


def _send(peer: socket.socket, message: bytes) -> None:
    """Send the last message of this side; a peer that is gone needs none."""
    with contextlib.suppress(OSError):
        peer.sendall(message)
        peer.shutdown(socket.SHUT_WR)


def _read_all(peer: socket.socket) -> bytes:
    """Read until the other side hangs up."""
    parts = []
    with contextlib.suppress(OSError):
        while part := peer.recv(4096):
            parts.append(part)
    return b"".join(parts)


def _read_line(peer: socket.socket) -> str:
    peer.settimeout(_START.total_seconds())
    with peer.makefile("r", newline="\n") as lines:
        line = lines.readline().rstrip("\n")
    peer.settimeout(None)
    return line


def _keep_alive(peer: socket.socket) -> None:
    """Let the system ask after a silent peer every five seconds, and give it up after three questions."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
