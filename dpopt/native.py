"""C code that is built by the system's compiler at its first use (about a second) and kept in the user's cache folder.

The name of a library depends on source, flags, compiler and processor.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from dpopt.machine import cache_folder, processor_features

_FLAGS = "-std=c11 -O3 -march=native -fno-math-errno -fno-trapping-math -fno-strict-aliasing -shared -fPIC"
_PROCESS = os.getpid()
_PARTS = 4  # for each thread, so that none waits long for the last
_SHARE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def library(*sources: Path, flags: str = "") -> ctypes.CDLL:
    """Compile C files, or load their library from the cache.

    Args:
        sources: the files, headers as well; the name of the first one's folder begins the library's.
        flags: of the compiler, in addition to the common ones.

    Raises:
        OSError: when there is no compiler, or it fails.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise OSError("no C compiler was found (install gcc or clang, or name one in CC)")
    words = [*_FLAGS.split(), *flags.split()]
    known = "\n".join([source.read_text() for source in sources])
    known += "\n".join([" ".join(words), os.path.realpath(compiler), platform.platform(), processor_features()])
    cache = cache_folder()
    built = cache / f"{sources[0].parent.name}-{hashlib.sha256(known.encode()).hexdigest()[:16]}.so"
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:  # on the same disk: other processes see all or nothing
            fresh = Path(folder) / built.name
            files = [str(source) for source in sources if source.suffix == ".c"]
            command = [compiler, *words, *files, "-o", str(fresh), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise OSError(f"{compiler} failed: {done.stderr.strip().splitlines()[-1:]}")
            fresh.replace(built)
    return ctypes.CDLL(str(built))


def room(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Make a tensor for C code, whatever type and device torch makes tensors of by default."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def in_parts(work: Callable[[int, int], Any], count: int, least: int) -> None:
    """Call work(begin, end) on parts of range(count) of at least `least`, in as many threads as torch has."""
    threads, parts = torch.get_num_threads(), max(1, count // max(1, least))
    if threads == 1 or parts == 1:
        work(0, count)
        return
    parts = min(parts, _PARTS * threads)
    borders = [count * i // parts for i in range(parts + 1)]
    if (run := _openmp(os.getpid())) is None:
        list(_pool(os.getpid(), threads).map(work, borders[:-1], borders[1:]))
        return
    left, failures = iter(range(parts)), list[BaseException]()

    def share(_: Any) -> None:
        try:
            for i in left:
                work(borders[i], borders[i + 1])
        except BaseException as failure:  # nothing may leave through the C code
            failures.append(failure)

    run(_SHARE(share), None, threads, 0)
    if failures:
        raise failures[0]


@functools.cache
def _openmp(process: int) -> Any:
    """Find what runs a function in torch's threads; None in a fork, or where torch is built without GNU's OpenMP.

    These threads wait for their next work by spinning, and would slow down any others.
    """
    if process != _PROCESS:
        return None
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*"):
        with contextlib.suppress(OSError, AttributeError):
            run = ctypes.CDLL(str(path)).GOMP_parallel
            run.argtypes, run.restype = [_SHARE, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
            return run
    return None


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: a fork has none of its parent's."""
    return ThreadPoolExecutor(threads)
