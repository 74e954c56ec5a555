"""The benchmark runs, and what it compares with is what it says."""

import sys

import pytest
import torch
from helpers import ROOT
from torch import nn

from dpopt.optim import MicroAdam
from dpopt.privacy.raw_statistics import RawStatistics

pytestmark = pytest.mark.slow


@pytest.fixture
def bench_optim(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import bench_optim

    return bench_optim


def test_the_literal_rendering_is_the_algorithm(bench_optim):
    """50 steps to 1e-6 against MicroAdam as the paper runs it, which test_microadam.py holds against the equations."""
    start = [torch.randn(70, 71), torch.randn(9)]
    ours, theirs = ([nn.Parameter(t.clone()) for t in start] for _ in range(2))
    micro = MicroAdam(ours, lr=0.01, density=0.1, bits=32, scope="tensor", dense_size=0)
    paper = bench_optim.PaperMicroAdam(theirs, lr=0.01, density=0.1)
    for _ in range(50):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        micro.step()
        paper.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_table_and_figure(bench_optim, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_optim, "shapes", lambda name: [torch.Size([70, 70]), torch.Size([70])])
    monkeypatch.setattr(
        sys, "argv", ["bench_optim", "--models", "wrn_16_4", "--rounds", "3", "--output", str(tmp_path)]
    )
    bench_optim.main()
    (table,) = tmp_path.glob("bench_optim_*.md")
    text = table.read_text()
    assert "`python scripts/bench_optim --models wrn_16_4 --rounds 3`" in text  # not where it was written
    for row in ("MicroAdam 4-bit", "AdamW (fused)", "paper, per tensor", "noise + MicroAdam 4-bit"):
        assert f"| {row} |" in text
    assert "8.000" in text and table.with_suffix(".png").stat().st_size > 5000


def test_noise_check(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import check_noise

    monkeypatch.setattr(check_noise, "STREAMS", 2)
    check_noise.print_battery()
    check_noise.print_draws(5_000_000)
    out = capsys.readouterr().out
    assert "| 4.0 σ |" in out and "NO" not in out and ": pass" in out and "birthday" in out


def test_the_engine_benchmark(monkeypatch, tmp_path):
    """A process per variant: times, ratios, memory, and why a variant has none."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import bench_engine

    variants = ["dpopt", "Opacus, hooks"]
    rows = bench_engine.bench("cnn", 4, 16, "cpu", 2, [bench_engine.PLAIN, *variants])
    assert [row["variant"] for row in rows] == [bench_engine.PLAIN, *variants]
    assert rows[0]["ratio"] == 1 and all(row["ratio"] > 0 and row["peak"] > 0 for row in rows)
    broken = bench_engine.bench("cnn", 32, 16, "cpu", 2, [bench_engine.PLAIN, "dpopt"])[1]  # a batch of no example
    table = bench_engine.markdown([*rows, broken], "# Title")
    assert "## cnn: 4 examples, K = 4" in table and "| Opacus, hooks |" in table and "| dpopt | " in table
    assert "Error" in table and "ratio" not in broken
    bench_engine.figure(rows, tmp_path / "figure.png", "")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_the_whole_step(monkeypatch):
    """DP-MicroAdam keeps less than DP-Adam, and all take turns."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import bench_training

    rows = bench_training.bench("wrn_16_4", 1, 2, "cpu", 2, list(bench_training.OPTIMIZERS), bench_training.__file__)
    assert [row["variant"] for row in rows] == list(bench_training.OPTIMIZERS)
    assert all(row["ratio"] > 0 and row["peak"] > 20e6 for row in rows)


def test_the_benchmark_of_ranks(monkeypatch, tmp_path):
    """One flat all-reduce per step, of all gradients and what rides behind them."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import bench_distributed

    monkeypatch.setattr(sys, "argv", ["", "--model", "cnn", "--batch", "4", "--rounds", "3", "--output", str(tmp_path)])
    bench_distributed.main()
    (page,) = tmp_path.glob("bench_distributed_*.md")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.read_text().splitlines() if "|" in line]
    found = {(step, ranks): cells for step, ranks, *cells in rows}
    parameters = sum(p.numel() for p in bench_distributed.MODELS["cnn"]().parameters())
    assert len(found) == 2 + 3 * 2
    for step in ("dpopt, DP-Adam", "dpopt, DP-MicroAdam"):
        assert found[step, "1"][3:5] == ["0", "0"]
        assert found[step, "2"][3:5] == ["1", f"{4 * (parameters + RawStatistics.ROOM):,}"]
    assert found[bench_distributed.PLAIN, "2"][4] == f"{4 * parameters:,}"
    for step in ("dpopt, DP-Adam", bench_distributed.PLAIN):
        assert found[step, "1"][1] == "1.00" and float(found[step, "2"][1]) > 0 and float(found[step, "2"][2]) > 0
        state = int(found[step, "2"][5].replace(",", ""))
        assert 8 * parameters <= state <= 8 * parameters + 200  # torch counts steps in tensors
    assert int(found["dpopt, DP-MicroAdam", "2"][5].replace(",", "")) < 2 * parameters
