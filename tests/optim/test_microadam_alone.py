"""MicroAdam in another library: dpopt without what dpopt depends on, as `pip install --no-deps` leaves it."""

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from dpopt.optim import MicroAdam

pytestmark = pytest.mark.slow

STEPS = """
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(60, 40), torch.nn.Tanh(), torch.nn.Linear(40, 3))
inputs, targets = torch.randn(64, 60), torch.arange(64) % 3
optimizer = MicroAdam(model.parameters(), lr=1e-2, density=0.05)
losses = []
for _ in range(12):
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(inputs), targets)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
optimizer.load_state_dict(optimizer.state_dict())
"""
ALONE = f"""
import json, sys
sys.path.append(FOLDER)  # next to the standard library
import torch
from dpopt.optim import MicroAdam
{STEPS}
import importlib.util, dpopt
print(json.dumps([losses, [name for name in FOREIGN if importlib.util.find_spec(name)], dpopt.__file__]))
"""
FOREIGN = ("hydra", "opacus", "dp_accounting", "cryptography", "scipy", "matplotlib", "safetensors", "rich", "triton")


def required(*names: str) -> set[str]:
    """The distributions that some need, without extras."""
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop().lower().replace("_", "-")
        if name in found:
            continue
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        todo += [re.match(r"[\w.-]+", need)[0] for need in needs if "extra ==" not in need]
    return found


def link_packages(folder: Path) -> None:
    """Make a folder of packages that holds torch with its requirements, NumPy and dpopt; Triton is optional."""
    for name in required("torch", "numpy") - {"triton"}:
        for file in importlib.metadata.files(name) or []:
            top = file.parts[0]
            path = Path(str(importlib.metadata.distribution(name).locate_file(top)))
            if top not in ("..", "__pycache__") and path.exists() and not (folder / top).exists():
                (folder / top).symlink_to(path)
    (folder / "dpopt").symlink_to(ROOT / "dpopt")


def test_it_needs_torch_and_numpy_alone(tmp_path):
    link_packages(tmp_path)
    text = f"FOLDER, FOREIGN = {str(tmp_path)!r}, {FOREIGN!r}\n{ALONE}"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", text], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    losses, foreign, file = json.loads(done.stdout)
    assert file == str(tmp_path / "dpopt" / "__init__.py") and foreign == []
    assert len(losses) == 12 and losses[-1] < losses[0]
    scope = {"torch": torch, "MicroAdam": MicroAdam}
    exec(STEPS, scope)
    assert losses == pytest.approx(scope["losses"], rel=1e-5)
