"""`dpopt budget`: the table and the heat map."""

import argparse
import re

import matplotlib.image
import numpy as np
import pytest

from dpopt.cli import budget
from dpopt.privacy.accounting import calibrate_noise, compute_epsilon

pytestmark = pytest.mark.slow
SETTING = ["--size", "5000", "--delta", "1e-5"]


def cells(text: str) -> dict[str, list[float]]:
    """The rows of a printed table, by batch size."""
    rows = [line.split("│")[1:-1] for line in text.splitlines() if line.startswith("│")]
    return {row[0].strip(): [float(value) for value in row[1:]] for row in rows}


def test_sigma_for_an_epsilon(command, tmp_path):
    done = command("budget", *SETTING, "--epsilon", "4", "--batch", "250,1000", "--epochs", "2,5,20")
    assert done.returncode == 0, done.stderr
    found = cells(done.stdout)
    assert list(found) == ["250", "1,000"] and "ε = 4, N = 5,000, δ = 1e-05" in done.stdout
    assert found["250"][2] == pytest.approx(calibrate_noise(4, 0.05, 400, 1e-5), rel=1e-3)
    assert found["1,000"][0] == pytest.approx(calibrate_noise(4, 0.2, 10, 1e-5), rel=1e-3)
    assert all(a < b < c for a, b, c in found.values()) and (tmp_path / "budget.png").exists()


def test_epsilon_for_a_sigma(command, tmp_path):
    done = command("budget", *SETTING, "--sigma", "1.1", "--batch", "100,1000", "--epochs", "1,0.5", "-o", "map.png")
    assert done.returncode == 0, done.stderr
    found = cells(done.stdout)
    for batch, epochs, value in (("100", 1, found["100"][0]), ("1,000", 0.5, found["1,000"][1])):
        size = int(batch.replace(",", ""))
        assert value == pytest.approx(compute_epsilon(1.1, size / 5000, round(epochs * 5000 / size), 1e-5), rel=1e-3)
    assert (tmp_path / "map.png").exists() and "wrote map.png" in done.stdout


def test_the_map_shows_small_values_dark_and_large_ones_bright(tmp_path):
    arguments = argparse.Namespace(epochs=[1.0, 2.0], batch=[10, 20], output=tmp_path / "map.png")
    budget.draw([[0.1, 100.0], [0.1, 100.0]], arguments, "title", "σ")
    brightness = matplotlib.image.imread(arguments.output)[..., :3].mean(-1)
    height, width = brightness.shape
    row = brightness[height // 3]
    assert np.median(row[width // 6 : width // 3]) < 0.3 < np.median(row[width // 2 : 2 * width // 3])


@pytest.mark.parametrize(
    "words, meant",
    [
        ("--epsilon 8 --batch 6000 --epochs 1", "batch_size=6,000 must lie between 1 and the 5,000"),
        ("--epsilon 8 --batch 0 --epochs 1", "batch_size=0 must lie between"),
        ("--epsilon 0 --batch 10 --epochs 1", "epsilon=0 must be a positive number"),
        ("--epsilon inf --batch 10 --epochs 1", "epsilon=inf must be a positive number"),
        ("--sigma nan --batch 10 --epochs 1", "sigma=nan must be a positive number"),
        ("--sigma 1 --batch 10 --epochs -1", "epochs=-1 must be a positive number"),
        ("--sigma 1e-3 --batch 10 --epochs 1", "noise_multiplier=0.001 must be between"),
        ("--sigma 1 --batch 10 --epochs 1 --delta 1e-3", "delta=0.001 is not below 1/dataset_size"),
        ("--sigma 1 --batch 10 --epochs 1 -o no/where.png", "no/where.png cannot be written"),
    ],
)
def test_refusals_are_one_sentence(command, words, meant):
    done = command("budget", *SETTING, *words.split())
    assert done.returncode == 1 and meant in done.stderr and done.stderr.count("\n") == 1


def test_an_epsilon_of_zero_is_drawn(command, tmp_path):
    done = command("budget", *SETTING, "--sigma", "9000", "--batch", "10,5000", "--epochs", "0.01,1")
    assert done.returncode == 0 and cells(done.stdout)["10"][0] == 0 and (tmp_path / "budget.png").exists()


@pytest.mark.parametrize("words", ["--batch 10 --epochs 1", "--epsilon 1 --sigma 1 --batch 10 --epochs 1"])
def test_exactly_one_of_epsilon_and_sigma(command, words):
    done = command("budget", *SETTING, *words.split())
    assert done.returncode == 2 and re.search("required|not allowed", done.stderr)


def test_bad_numbers_are_named(command):
    done = command("budget", *SETTING, "--epsilon", "8", "--batch", "a,b", "--epochs", "1")
    assert done.returncode == 2 and "'a,b'" in done.stderr
