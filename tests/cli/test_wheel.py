"""The wheel holds everything that a run needs; an editable install is found from every folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import CONF, ROOT

pytestmark = pytest.mark.slow

CALL = "import sys; sys.argv[0] = 'dpopt'; from dpopt.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what is built, in a folder named dpopt."""
    folder = tmp_path_factory.mktemp("parent") / "dpopt"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("dpopt", "conf"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def install(checkout: Path, kind: str) -> Path:
    """Build a wheel without a network, and unpack it."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}('../{kind}'))"
    (checkout.parent / kind).mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True)
    if done.returncode and "No module named 'setuptools'" in done.stderr:
        pytest.skip("a wheel is built by setuptools, which is not installed")
    assert done.returncode == 0, done.stderr
    site = checkout.parent / f"{kind}-site"
    with zipfile.ZipFile(checkout.parent / kind / done.stdout.split()[-1]) as wheel:
        wheel.extractall(site)
    return site


def test_a_wheel_trains_outside_a_checkout(checkout, tmp_path):
    site = install(checkout, "wheel")
    for source, target in ((CONF, "conf"), (ROOT / "dpopt", ".")):
        names = {p.relative_to(source) for p in source.rglob("*") if p.suffix in (".yaml", ".py", ".c", ".h", ".typed")}
        assert all((site / "dpopt" / target / name).is_file() for name in names) and len(names) > 50
    assert {path.name.partition("-")[0] for path in site.iterdir()} == {"dpopt"}  # no tests, no conf at the top
    assert "dpopt = dpopt.cli:main" in next(site.glob("*.dist-info/entry_points.txt")).read_text()
    (tmp_path / "own/optimizer").mkdir(parents=True)
    (tmp_path / "own/optimizer/mine.yaml").write_text("_target_: torch.optim.RMSprop\nlr: 1e-3\n")
    words = ["train", "experiment=quickstart", "steps=40", "--config-dir", "own", "optimizer=mine"]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    code = f"import dpopt; assert dpopt.__file__.startswith({str(site)!r}); {CALL}"
    run = [sys.executable, "-c", code, *words]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(tmp_path.glob("runs/digits-cnn-rmsprop-*/result.json"))) == 1


def test_an_editable_install_is_found_from_the_parent_folder(checkout):
    """There the folder `dpopt` would hide a finder, but not a path."""
    site = install(checkout, "editable")
    code = f"import site, sys; sys.path = [p for p in sys.path if p != {str(ROOT)!r}]; site.addsitedir({str(site)!r}); "
    code += "import dpopt; print(dpopt.__version__, dpopt.__file__)"
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=checkout.parent, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split()[1] == str(checkout / "dpopt/__init__.py"), done.stderr
