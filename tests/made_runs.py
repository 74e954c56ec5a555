"""Run directories without a training: a result, metrics and a card, as a finished run leaves them."""

import csv
from dataclasses import asdict
from pathlib import Path
from typing import Any

from helpers import configure

from dpopt import files


def make_run(folder: Path, name: str, accuracy: float, seed: int = 0, **changes: Any) -> Path:
    """A finished run of quickstart; `changes` go into its configuration, or into its result where it has the key."""
    directory = folder / name
    directory.mkdir(parents=True)
    config = asdict(configure("experiment=quickstart")) | {"seed": seed}
    result = {
        "status": "finished",
        "run": name,
        "test_accuracy": accuracy,
        "test_loss": 1 - accuracy,
        "epsilon": 7.9996,
        "steps": 40,
        "wall_seconds": 12.3,
        "data_mac": "a",
        "fingerprint_key": "k",
    }
    result |= {key: value for key, value in changes.items() if key in result}
    config |= {key: value for key, value in changes.items() if key not in result}
    files.write_json(directory / "result.json", result | {"config": config})
    (directory / "privacy_card.md").write_text(f"# Privacy card: {name}\n\n**(ε = 8)**-differential privacy\n")
    with (directory / "metrics.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerows([("step", "test/accuracy"), (20, accuracy - 0.2), (40, accuracy)])
    return directory


def make_three_groups(folder: Path) -> None:
    """Three seeds of MicroAdam, three of Adam, and one run of SGD with another seed."""
    adam = {"_target_": "torch.optim.Adam", "lr": 1e-3}
    for seed, one, other in ((0, 0.90, 0.93), (1, 0.92, 0.94), (2, 0.94, 0.98)):
        make_run(folder, f"a-microadam-{seed}", one, seed)
        make_run(folder, f"b-adam-{seed}", other, seed, optimizer=adam)
    make_run(folder, "c-sgd", 0.5, 7, optimizer={"_target_": "torch.optim.SGD", "lr": 1.0})
