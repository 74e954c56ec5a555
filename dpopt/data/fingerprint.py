"""Fingerprints of data and weights, and the key under which they may be written down.

A fingerprint tells datasets apart: it is part of the key of a run's noise, so that no two datasets share noise, and it
shows a resumed run that its data changed. `content` covers every byte of every example. `quick` takes a Dataset's word,
where it has a method `fingerprint()`, which is enough where a secret key keeps runs apart; else it is `content`.

A bare hash of private data lets anyone test a guess of the data. What is written down is therefore `FingerprintKey.mac`
of a fingerprint: HMAC-SHA256 (RFC 2104) under a random key that stays with the user.
"""

import hashlib
import hmac
import os
import secrets
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

Kind = Literal["content", "quick"]
_KEY_BYTES = 32
_SILENT, _BETWEEN = 2.0, 30.0  # seconds before progress is shown, and between its lines in a file
T = TypeVar("T")


def home() -> Path:
    """Locate what a user's runs share: $DPOPT_HOME, or dpopt in $XDG_DATA_HOME."""
    if own := os.environ.get("DPOPT_HOME"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_DATA_HOME") or Path("~/.local/share").expanduser()) / "dpopt"


@dataclass(frozen=True)
class FingerprintKey:
    """The user's random 256-bit key for what is derived from private data; shared by all runs, never uploaded.

    Attributes:
        material: the key.
    """

    material: bytes = field(repr=False)

    @classmethod
    def load(cls) -> "FingerprintKey":
        """Read the user's key; make it if there is none.

        Raises:
            ValueError: when the file is damaged or readable by others.
            OSError: when it cannot be read or made.
        """
        path = home() / "fingerprint.key"
        try:
            if not path.exists():
                _make_key(path)
            material, mode = path.read_bytes(), path.stat().st_mode
        except OSError as error:
            raise OSError(
                f"the fingerprint key {path} cannot be read or made ({error.strerror}): set DPOPT_HOME to a folder of "
                "yours on a local disk"
            ) from error
        if len(material) != _KEY_BYTES or not any(material):
            raise ValueError(
                f"the fingerprint key {path} is damaged: restore it, or delete it, after which unfinished runs have to "
                "start again with fresh=true"
            )
        if mode & 0o077:
            raise ValueError(f"the fingerprint key {path} is open to other users: run chmod 600 {path}")
        return cls(material)

    @property
    def key_id(self) -> str:
        """Tells whether two MACs were made under one key."""
        return self._derive(b"id").hex()[:16]

    def mac(self, fingerprint: str) -> str:
        """Compute the HMAC-SHA256 of a fingerprint, in hex, fit to be stored."""
        return self._derive(b"mac", fingerprint.encode()).hex()

    def seal(self, name: bytes) -> bytes:
        """Derive 48 bytes: 16 name a cache record, 32 hide its content."""
        return hashlib.blake2b(name, key=self._derive(b"cache"), digest_size=48).digest()

    def _derive(self, *parts: bytes) -> bytes:
        return hmac.digest(self.material, b"\0".join((b"dpopt fingerprint", *parts)), "sha256")


def _make_key(path: Path) -> None:
    """Write a new key atomically, unless another process was faster."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):  # another process was faster, and its key counts
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def combine(*parts: str | bytes) -> str:
    """Hash parts, each told apart from the next, into one fingerprint."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


def tensor_digest(tensor: Tensor) -> bytes:
    """Hash the dtype, the shape and every byte of a tensor."""
    digest = hashlib.sha256(str((tensor.dtype, tuple(tensor.shape))).encode())
    digest.update(_bytes(tensor).numpy())
    return digest.digest()


def row_digests(tensor: Tensor) -> list[bytes]:
    """Hash each row of a tensor (N, …); equal rows agree."""
    about = hashlib.sha256(str((tensor.dtype, tuple(tensor.shape[1:]))).encode())
    found = []
    for row in _bytes(tensor).view(len(tensor), -1).numpy() if len(tensor) else ():
        digest = about.copy()
        digest.update(row)
        found.append(digest.digest())
    return found


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8).cpu()


def file_fingerprint(path: str | Path) -> str:
    """Hash the bytes of a file, of initial weights for instance.

    Raises:
        OSError: when it cannot be read.
    """
    with open(Path(path).expanduser(), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def module_fingerprint(model: torch.nn.Module) -> str:
    """Hash the names and every byte of a model's parameters and buffers."""
    tensors: dict[str, Any] = dict(model.named_parameters()) | dict(model.named_buffers())
    return combine(*(part for name in sorted(tensors) for part in (name, tensor_digest(tensors[name]))))


def progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Yield the items and, after two seconds, show how far they are.

    Args:
        items: what is worked through.
        total: their number.
        what: what is being done, for the message on stderr.
    """
    live = sys.stderr.isatty()
    began, shown, said = time.monotonic(), 0.0, False
    for number, item in enumerate(items):
        yield item
        now = time.monotonic()
        if now - began > _SILENT and now - shown > (0.5 if live else _BETWEEN):
            end = "\r" if live else "\n"
            print(f"{what}: {number + 1:,} of {total:,}", end=end, file=sys.stderr, flush=True)
            shown, said = now, True
    if said:
        print(f"{what}: {total:,} in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
