"""Image files: their digests, and a check that each can be decoded, both done once and kept.

Every file is read and decoded before the first step, so that a damaged one is named before a run directory is made.
One core decodes 1,200 JPEGs of 500×375 (100 kB) per second, a cache finds 90,000: ImageNet takes 18 minutes on one core
the first time, and 15 seconds after that. So reading the content costs no more than the check, and a repaired or copied
file with the same bytes is the same data, whatever its time.

The cache lies in `home()`, one file per root folder, as records of 48 bytes under the user's fingerprint key: 16 that
name a file with its size, times and inode, and its digest behind a 32-byte pad. Without the key it tells nothing.
"""

import hashlib
import io
import os
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from dpopt.data.fingerprint import FingerprintKey, home, progress
from dpopt.files import replace_durably

_NAME, _RECORD = 16, 48
_AHEAD = 1024  # files that are read between two looks at the clock
_SAVE_EVERY = 60.0  # seconds between saves of what has been read
_SETTLED = 2.0  # seconds: a file changed more recently may change again under the same time


def image_digests(root: Path, paths: Sequence[str]) -> list[bytes]:
    """Hash image files and check that each decodes, once per file.

    Args:
        root: the folder they lie in, which names the cache.
        paths: the files.

    Raises:
        OSError: naming the files that cannot be decoded.
    """
    cache = _Cache(root)
    seals = [cache.seal(path) for path in paths]
    found: list[bytes | None] = [cache.find(seal) for seal in seals]
    missing = [at for at, digest in enumerate(found) if digest is None]
    damaged: list[tuple[str, str]] = []
    last_save = time.monotonic()
    with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
        pieces = range(0, len(missing), _AHEAD)
        done = (
            (at, result)
            for piece in pieces
            for at, result in zip(
                missing[piece : piece + _AHEAD],
                pool.map(_inspect, [paths[at] for at in missing[piece : piece + _AHEAD]]),
                strict=True,
            )
        )
        for at, result in progress(done, len(missing), f"reading and checking the images in {root}"):
            if isinstance(result, str):
                damaged.append((paths[at], result))
                continue
            found[at] = result
            cache.add(seals[at], result)
            if time.monotonic() - last_save > _SAVE_EVERY:
                cache.save()
                last_save = time.monotonic()
    cache.save()
    if damaged:
        others = f"; {len(damaged) - 1} more cannot be read either" if len(damaged) > 1 else ""
        raise OSError(
            f"{damaged[0][0]} cannot be read as an image ({damaged[0][1]}): repair or replace it, or remove it and set "
            f"dataset.train_size accordingly{others}"
        )
    return [digest for digest in found if digest is not None]


def _inspect(path: str) -> bytes | str:
    """Decode a file and hash it; a string says why it failed."""
    from PIL import Image, UnidentifiedImageError

    try:
        content = Path(path).read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
    except UnidentifiedImageError:
        return "no image format is recognized"
    except Exception as error:  # every format has its own
        return (str(error) or type(error).__name__).splitlines()[0]
    return hashlib.sha256(content).digest()


def open_folder(root: Path, transform: Any) -> Any:
    """Open a folder of class folders of images.

    Raises:
        FileNotFoundError: for a folder without class folders, or a class folder without images.
    """
    from torchvision.datasets import ImageFolder

    try:
        return ImageFolder(root, transform)
    except FileNotFoundError as error:
        names = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        if not names:
            raise FileNotFoundError(f"{root} has no class folders: put the images at {root}/CLASS/IMAGE") from error
        without = str(error).partition("classes ")[2].partition(". Supported")[0]
        raise FileNotFoundError(
            f"{root} has class folders without images ({without or 'all'}): give each at least one .jpg, .jpeg, .png, "
            ".ppm, .bmp, .pgm, .tif, .tiff or .webp file, or remove the folder"
        ) from error


class _Cache:
    """Digests of decoded files by path, size, times and inode; without a folder to lie in it stays empty."""

    def __init__(self, root: Path) -> None:
        self.key, self.added = FingerprintKey.load(), False
        self.known: dict[bytes, bytes] = {}
        name = self.key.seal(str(root.resolve()).encode())[:_NAME].hex()
        self.path = home() / "image_digests" / name
        content = self.path.read_bytes() if self.path.exists() else b""
        for at in range(0, len(content) - _RECORD + 1, _RECORD):
            self.known[content[at : at + _NAME]] = content[at + _NAME : at + _RECORD]

    def seal(self, path: str) -> bytes:
        """Name the file as it is now; empty while it may change."""
        about = os.stat(path)
        times = (about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino)
        settled = time.time() - about.st_ctime > _SETTLED
        return self.key.seal(f"{os.path.abspath(path)}\0{times}".encode()) if settled else b""

    def find(self, seal: bytes) -> bytes | None:
        """Return the digest kept under a seal."""
        hidden = self.known.get(seal[:_NAME]) if seal else None
        return None if hidden is None else _xor(hidden, seal[_NAME:])

    def add(self, seal: bytes, digest: bytes) -> None:
        """Keep a digest under a seal."""
        if seal:
            self.known[seal[:_NAME]] = _xor(digest, seal[_NAME:])
            self.added = True

    def save(self) -> None:
        """Write what was added; a disk that refuses costs only time."""
        if not self.added:
            return
        with suppress(OSError):
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}")
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(b"".join(name + hidden for name, hidden in self.known.items()))
            replace_durably(temporary, self.path)
            self.added = False


def _xor(a: bytes, b: bytes) -> bytes:
    return (int.from_bytes(a, "little") ^ int.from_bytes(b, "little")).to_bytes(len(a), "little")
