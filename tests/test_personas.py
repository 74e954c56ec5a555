"""People who use dpopt, followed through their work: a company's pictures, an ablation, a terminal with TAB.

Who moves from Opacus is in test_from_opacus.py, who takes MicroAdam alone in optim/test_microadam_alone.py.
"""

import contextlib
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")]

CALL = "import sys; sys.argv[0] = 'dpopt'; from dpopt.cli import main; sys.exit(main())"


@pytest.fixture
def terminal(tmp_path) -> dict[str, str]:
    """The environment of a terminal where `dpopt` is this checkout's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "dpopt").write_text(f"#!{sys.executable}\n{CALL}\n")
    (folder / "dpopt").chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def make_pictures(folder: Path) -> None:
    """Three kinds of parts, told apart by their color; one is a PNG."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 60), ("val", 12)):
        for channel, name in enumerate(("bolts", "gears", "nuts")):
            where = folder / part / name
            where.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 80, (40, 40, 3))
                pixels[..., channel] += 150
                suffix = "png" if number == 0 else "jpg"
                Image.fromarray(pixels.astype("uint8")).save(where / f"{number}.{suffix}")


def test_a_company_gets_from_its_pictures_to_a_privacy_card(tmp_path, terminal):
    """By the commands of docs/own_data.md: five at most, besides naming the run."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/own_data.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "privacy_card" in block]
    commands = [line for line in block.splitlines() if not re.match(r"[A-Z]+=", line)]
    assert 1 <= len(commands) <= 5
    make_pictures(tmp_path / "parts")
    done = subprocess.run(
        ["bash", "-ec", block], cwd=tmp_path, env=terminal, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "N = 180 (public)" in done.stdout and "(ε = 8, δ = 0.001)" in done.stdout
    assert "## Not accounted" in done.stdout and "drawn at random by the seed" in done.stdout
    assert float(re.search(r"accuracy ([\d.]+)%, loss", done.stdout)[1]) > 60  # chance is 33


def test_twelve_runs_are_compared_by_one_command(command, tmp_path):
    words = ("model=linear", "optimizer=dp_sgd,dp_adam", "epsilon=3,8", "seed=0,1,2", "steps=2", "eval_every=2")
    done = command("train", "-m", "experiment=quickstart", *words)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("runs/*/result.json"))) == 12
    done = command("runs", "compare", "runs/*")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "±" in line]
    assert len(rows) == 4 and sum("(n = 3)" in row for row in rows) == 3  # differences to the first, over equal seeds


@contextlib.contextmanager
def shell(folder: Path, environment: dict[str, str]) -> Iterator[int]:
    """Start an interactive bash in a pseudo-terminal; yield its end."""
    child, end = pty.fork()
    if child == 0:
        os.chdir(folder)
        os.execve(shutil.which("bash"), ["bash", "--norc", "--noprofile", "-i"], environment)
    try:
        yield end
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(end)


def read_until(end: int, text: str, seconds: float = 60) -> str:
    """Read what the terminal shows until the text is there, or for so long."""
    seen, deadline = b"", time.monotonic() + seconds
    while text not in seen.decode(errors="replace") and time.monotonic() < deadline:
        if select.select([end], [], [], 0.2)[0]:
            seen += os.read(end, 4096)
    return seen.decode(errors="replace")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # threads of torch; the child only calls exec
def test_tab_completes_in_a_terminal(tmp_path, terminal):
    with shell(tmp_path, {**terminal, "TERM": "dumb", "PS1": "ready> "}) as end:
        assert "ready> " in read_until(end, "ready> ")
        os.write(end, b'eval "$(dpopt -sc install=bash)"; echo installed-$?\n')
        assert "installed-0" in read_until(end, "installed-0\r\nready> ")
        for typed, completed in ((b"dpopt est", "dpopt estimate"), (b" filter=k", "filter=kalman")):
            os.write(end, typed + b"\t")
            shown = read_until(end, completed.split("=")[-1].removeprefix("dpopt "))
            assert completed in shown, shown
