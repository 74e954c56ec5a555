"""The soak test kills and compares, and notices what it is there for."""

import csv
import json
import random
import re
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture
def soak(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import soak

    return soak


def test_four_kills(soak, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["soak", "4", "--seed", "2"])
    code = soak.main()
    told = capsys.readouterr().out
    assert code == 0, told
    rows = re.findall(r"^\| (?:setup|step|checkpoint write|export) \|(.*)\|$", told, re.MULTILINE)
    assert len(rows) == 4 and sum(int(count) for row in rows for count in row.split("|")) == 4
    assert re.search(r"\n4 kills, [1-9]\d* runs finished with the same bits, 0 failures", told)


def filled(soak, folder):
    """A run directory as a run leaves it."""
    run = soak.Run(folder)
    (run.directory / "secret.key").unlink()
    torch.save(
        {"step": 4, "parts": {"model": {"w": torch.zeros(3)}}, "progress": {"wall_seconds": 1.0}},
        run.directory / "checkpoint.pt",
    )
    with open(run.directory / "metrics.csv", "w") as file:
        csv.writer(file).writerows([["step", "test/loss", "time/wall_seconds"], [4, 0.5, 1.0]])
    (run.directory / "result.json").write_text(json.dumps({"epsilon": 1.0, "wall_seconds": 1.0}))
    (run.directory / "model.safetensors").write_bytes(b"weights")
    return run


def test_differences_are_found(soak, tmp_path):
    wanted, run = filled(soak, tmp_path / "wanted"), filled(soak, tmp_path / "run")
    assert soak.compare(run, wanted) == []
    (run.directory / "result.json").write_text(json.dumps({"epsilon": 1.0, "wall_seconds": 2.0}))
    assert soak.compare(run, wanted) == []  # clocks differ
    (run.directory / ".checkpoint.pt.tmp").touch()
    (run.directory / "secret.key").touch()
    (run.directory / "model.safetensors").write_bytes(b"Weights")
    (run.directory / "result.json").write_text(json.dumps({"epsilon": 2.0}))
    (run.directory / "metrics.csv").write_text("step,test/loss\n4,0.6\n")
    weights = torch.full((3,), torch.finfo(torch.float32).smallest_normal)
    torch.save({"step": 4, "parts": {"model": {"w": weights}}}, run.directory / "checkpoint.pt")
    names = [".checkpoint.pt.tmp", "checkpoint.pt", "metrics.csv", "model.safetensors", "result.json", "secret.key"]
    assert soak.compare(run, wanted) == names


def test_who_goes_on_and_who_says_nothing_is_found(soak, tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "GRACE", 0.3)
    monkeypatch.setattr(soak.Soak, "_undisturbed", lambda self: None)
    soaked, run = soak.Soak(tmp_path, random.Random(0)), soak.Run(tmp_path / "run")
    run.log.write_text("nothing")
    launched, rank = (subprocess.Popen(["sleep", "60"]) for _ in range(2))
    roles = {"torchrun": launched.pid, "rank 0": rank.pid}
    rank.kill()
    assert soaked._after_kill(run, launched, roles, "rank 0", "rank 0 of 2 killed during step")
    assert soaked.failures[0].startswith("rank 0 of 2 killed during step: torchrun still ran 0 seconds later")
    rank.wait()
    assert soaked._after_kill(run, launched, roles, "rank 0", "rank 0 of 2 killed during step")
    assert "nobody said so" in soaked.failures[1] and soaked.table().endswith(soaked.failures[1])
    run.log.write_text("dpopt: rank 0 on here was killed or is lost")
    assert not soaked._after_kill(run, launched, roles, "rank 0", "rank 0 of 2 killed during step")
    assert len(soaked.failures) == 2
    shutil.rmtree(run.folder)
