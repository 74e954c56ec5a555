"""The page of methods, docs/methods.md, from the heads of the YAML files and from what the code says and measures.

python scripts/make_methods.py            # writes docs/methods.md
"""

import math
import re
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from dpopt.config.components import build
from dpopt.config.overrides import from_hydra
from dpopt.privacy.mechanisms import BandMF, impulse
from dpopt.privacy.quick import quick_noise
from dpopt.training.cost import STEP_INFO, optimizer_state_bytes

ROOT = Path(__file__).resolve().parents[1]
SIZE = 1_000_000
EXAMPLES, BANDS = 50_000, (2, 4, 8, 16, 32)
INTRODUCTION = """\
# Methods

Any clip rule, optimizer and filter go together, except as [said below](#what-goes-with-what). Clip rules and estimators
act before `p.grad` and are accounted for; filters and optimizers are post-processing. A method that differs from its
published code says so at the top of its Python file, and so does one that was read from an abstract.
`python scripts/make_methods.py` writes this page from the heads of the YAML files; the memory is measured.
"""

NOTES = """\
## What goes with what

- `dp_adambc` and `dp_adamw_bc` subtract the variance of the noise, so they want noise that is the same in every
  coordinate: not with `filter=kalman`, a scale (`dp_adam_stp`, `dp_microadam_stp`) or `estimator=zeroth_order`. Under
  `clipping=adaptive` they follow the noise of every step.
- `schedule=clip_rate` follows a privatized clip rate: it wants `clipping=adaptive`.
- `estimator=zeroth_order` releases one number per step: no scale, no filter, no clip by layer. Its clip norm is one of
  slopes along a random direction.
- `mechanism=bandmf` and `mechanism=lambda_cgd` go with every optimizer, clip rule, filter and number of ranks, but not
  with `estimator=zeroth_order` and `audit`, which they refuse. `dpopt.poisson_batches` follows the plan's sampler.
- `estimator=federated` needs `dataset=clients`, and any optimizer is a server optimizer: `dp_sgd` at learning rate 1 is
  FedAvg, `dp_adam` FedAdam, `dp_microadam` FedMicroAdam. The unit is a client; q is the share of clients in a round.
- `model.weights=RUN` starts any model from a run on another dataset, for instance of `dataset=procedural`: ε does not
  cover the other one, the privacy card names the chain, and the same dataset is refused.
- `clipping=adaptive` gives a part of the budget to the count of unclipped examples: with the noise of its count at a
  twentieth of the batch (`count_noise=null`) the gradients' noise grows by (1 − (10·σ/(qN))²)^(−½), a thousandth at
  σ = 1 and qN = 256.
- Moving `s` of `clipping=psasc` at a fixed learning rate also moves the step: compare at equal `clip_norm`/s.
"""


MECHANISMS = """\
Correlated noise is negatively correlated: part of it cancels in the sum of the gradients, so plain and momentum SGD
arrive with less of it. Error of all prefix sums at equal ε in percent of DP-SGD's, N = 50,000, δ = 1e-5, PLD, at
ε = 1 / 3 / 8:

{table}

It is an error of sums, not an accuracy: an adaptive optimizer divides by what it has seen, and a step by itself has
more noise than DP-SGD's. A clip norm that moves, a scale or a filter leaves ε as it is, but noise then cancels less.
"""


def head(group: str, name: str) -> dict[str, str]:
    """Paper, rule and use of a method, from the comments that open its YAML."""
    lines = (ROOT / "conf" / group / f"{name}.yaml").read_text().removeprefix("# @package _global_\n").splitlines()
    found = {"paper": lines[1].removeprefix("# ")}
    for line in lines:
        if match := re.match(r"# (rule|use): (.*)", line):
            found[match[1]] = match[2].replace("|", "\\|")
    return found


def names(group: str) -> list[str]:
    """List the methods of a group, in alphabetical order."""
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))


def state_bytes(name: str) -> float:
    """Bytes of optimizer state per parameter, after a step on a million of them."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = from_hydra(compose("config", [f"optimizer={name}"]))
    parameter = nn.Parameter(torch.zeros(SIZE))
    parameter.grad = torch.randn(SIZE)
    optimizer = build("optimizer", config.optimizer)([parameter])
    for group in optimizer.param_groups:  # as `PrivateGradient.update_param_groups` does
        group.update({key: value for key, value in STEP_INFO.items() if key in group})
    optimizer.step()
    return optimizer_state_bytes(optimizer) / SIZE


def sensitivity(name: str) -> str:
    """S of a clip rule at clip_norm = 1."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = from_hydra(compose("config", [f"clipping={name}", "clip_norm=1"]))
    return f"{build('clipping', config.clipping)().sensitivity:g}"


def mechanism(name: str) -> tuple[str, str]:
    """Sampler and memory of a mechanism."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        made = build("mechanism", from_hydra(compose("config", [f"mechanism={name}"])).mechanism)()
    groups = made.groups(0.01)
    return "Poisson" if groups == 1 else f"cyclic Poisson, {groups} groups", f"{4 * made.kept}"


def error_of_sums(epochs: int, batch: int, bands: int) -> str:
    """Error of all prefix sums under BandMF in percent of that under DP-SGD, at three ε."""
    steps, rate, found = round(epochs * EXAMPLES / batch), batch / EXAMPLES, []
    mechanism = BandMF(bands)
    _, sampled, count = mechanism.composition(rate, steps)
    sums = np.cumsum(impulse(*mechanism.recursion(steps), steps))  # of C⁻¹'s first column: 1, 1, … for DP-SGD
    weights = np.arange(steps, 0, -1)
    error = math.sqrt(weights @ sums**2 / weights.sum())
    for epsilon in (1, 3, 8):
        noise, reference = quick_noise(epsilon, sampled, count, 1e-5), quick_noise(epsilon, rate, steps, 1e-5)
        found.append(f"{100 * error * noise / reference:.0f}")
    return " / ".join(found)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Write a Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def page() -> str:
    """Write the whole page."""
    parts = [INTRODUCTION]
    rows = []
    for name in names("optimizer"):
        about = head("optimizer", name)
        rows.append([f"`{name}`", about["rule"], f"{state_bytes(name):.3g}", about["use"], about["paper"]])
    parts += ["## optimizer=\n", table(["", "step", "state, B/parameter", "when", "paper"], rows), ""]
    rows = []
    for name in names("clipping"):
        about = head("clipping", name)
        rows.append([f"`{name}`", about["rule"], sensitivity(name), about["use"], about["paper"]])
    parts += ["## clipping=\n", table(["", "weight of g", "S at C = 1", "when", "paper"], rows), ""]
    costs = {
        ("filter", "none"): ("0", "none"),
        ("filter", "kalman"): ("8", "1; none with gamma=null"),
        ("estimator", "gradient"): ("0", "none"),
        ("estimator", "zeroth_order"): ("0", "two forward passes, no gradient"),
        ("estimator", "federated"): ("0", "K of a client's examples"),
        ("estimator", "least_squares"): ("0", "one forward pass in all, no gradient"),
    }
    rows = []
    for (group, name), (state, extra) in costs.items():
        about = head(group, name)
        rows.append([f"`{group}={name}`", about["rule"], state, extra, about["use"], about["paper"]])
    header = ["", "rule", "state, B/parameter", "extra gradients per step", "when", "paper"]
    parts += ["## filter= and estimator=\n", table(header, rows), ""]
    rows = []
    for name in names("mechanism"):
        about, (sampler, memory) = head("mechanism", name), mechanism(name)
        rows.append([f"`{name}`", about["rule"], sampler, memory, about["use"], about["paper"]])
    header = ["", "noise n_t of step t, in units of σS", "sampler at q = 0.01", "memory, B/parameter", "when", "paper"]
    settings = [(epochs, batch) for epochs in (5, 20) for batch in (256, 512, 1024)]
    errors = [[f"{e} epochs, batch {b:,}", *(error_of_sums(e, b, bands) for bands in BANDS)] for e, b in settings]
    against = table(["", *(f"bands={bands}" for bands in BANDS)], errors)
    parts += ["## mechanism=\n", table(header, rows), "", MECHANISMS.replace("{table}", against)]
    return "\n".join([*parts, NOTES])


if __name__ == "__main__":
    (ROOT / "docs/methods.md").write_text(page())
