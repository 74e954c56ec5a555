"""Where a model is from, for its privacy card: date, code, libraries, data, weights, and the user's ledger.

Values are Markdown. Data are named by a MAC, because a bare hash of private data lets anyone test a guess of the data.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dpopt
from dpopt.data.fingerprint import file_fingerprint
from dpopt.runs.markdown import code
from dpopt.runs.provenance import short_commit, versions

NOT_STATED = "not stated"


def code_rows(commit: str | None) -> dict[str, str]:
    """Name the date and the code."""
    where = "installed from a package, so the version says which code ran"
    if commit is not None:
        changed = ", with changes that no commit holds" if str(commit).endswith("-dirty") else ""
        where = f"commit {code(short_commit(commit))}{changed}"
    libraries = ", ".join(f"{name} {version}" for name, version in versions().items())
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d} (UTC)",
        "code": f"dpopt {dpopt.__version__}, {where}",
        "libraries": libraries,
    }


def data_row(mac: str, key_id: str) -> dict[str, str]:
    """Name the data by the MAC of their fingerprint."""
    return {
        "training data": f"HMAC-SHA256 {code(mac)} of their fingerprint under the key {code(key_id)}; who trained has "
        "the key, and can show whether other data are the same"
    }


def weights_row(name: str, path: Path | None) -> dict[str, str]:
    """Hash a file of weights, as `sha256sum` does; no row where there is none."""
    if path is None or not path.is_file():
        return {}
    return {name: f"{code(path.name)}, SHA-256 {code(file_fingerprint(path))}"}


def initial_file(node: Mapping[str, Any]) -> Path | None:
    """Locate the local file that a model's initial weights are read from; None where there is none.

    Args:
        node: the model's arguments, defaults included.
    """
    if node.get("weights"):
        return Path(str(node["weights"])).expanduser()
    if not (node.get("pretrained") and node.get("path")):
        return None
    path = Path(str(node["path"])).expanduser()
    return path / "model.safetensors" if path.is_dir() else path
