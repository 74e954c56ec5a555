"""C code that is built by the system's compiler at its first use (about a second) and kept in the user's cache folder.

The name of a library depends on source, flags, compiler and processor.
"""

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


def library(source: Path, flags: str = "") -> ctypes.CDLL:
    """Compile a C file, or load its library from the cache.

    Args:
        source: the file; the name of its folder begins the library's.
        flags: of the compiler, in addition to the common ones.

    Raises:
        OSError: when there is no compiler, or it fails.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise OSError("no C compiler was found (install gcc or clang, or name one in CC)")
    words = [*_FLAGS.split(), *flags.split()]
    known = "\n".join(
        [source.read_text(), " ".join(words), os.path.realpath(compiler), platform.platform(), processor_features()]
    )
    cache = cache_folder()
    built = cache / f"{source.parent.name}-{hashlib.sha256(known.encode()).hexdigest()[:16]}.so"
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:  # on the same disk: other processes see all or nothing
            fresh = Path(folder) / built.name
            command = [compiler, *words, str(source), "-o", str(fresh), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise OSError(f"{compiler} failed: {done.stderr.strip().splitlines()[-1:]}")
            fresh.replace(built)
    return ctypes.CDLL(str(built))


def in_parts(work: Callable[[int, int], Any], count: int, least: int) -> None:
    """Call work(begin, end) on parts of range(count), a thread of torch's number for each of at least `least`."""
    threads = max(1, min(torch.get_num_threads(), count // max(1, least)))
    if threads == 1:
        work(0, count)
        return
    borders = [count * i // threads for i in range(threads + 1)]
    list(_pool(os.getpid(), threads).map(work, borders[:-1], borders[1:]))


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: a fork has none of its parent's."""
    return ThreadPoolExecutor(threads)
