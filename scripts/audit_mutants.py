"""Audit the true code and wrong versions of it: the table and figure of experiments/results/audit.

python scripts/audit_mutants.py            # some minutes on two cores; `make audit` does the same

Digits, a linear model, q = 0.082, 2,500 steps, ε = 8 at δ = 1e-5, 10,000 canaries. Wrong versions that weaken the
guarantee are refuted by the GDP bound; the others by an exact check, which is named. The exit code is 1 if the true
code is refuted, or shows less than 0.6 of the claim, or a wrong version passes.
"""

import argparse
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from audit_versions import EMPTY, MUTANTS, PIECES, VIEWS, half_the_rate_accounted, small_checks
from sklearn.datasets import load_digits
from torch import nn

import dpopt
from dpopt.machine import processor
from dpopt.privacy.audit import AuditResult
from dpopt.privacy.canaries import CHECKS, Canaries
from dpopt.privacy.clipping import Adaptive, ClipRule, Flat, PerLayer
from dpopt.privacy.noise import NOISE_VERSION
from dpopt.privacy.plan import PrivacyPlan
from dpopt.privacy.private_gradient import PrivateGradient
from dpopt.privacy.zeroth_order import ZerothOrder
from dpopt.runs.audit_report import roc_figure
from dpopt.runs.provenance import versions

OUT = Path(__file__).resolve().parents[1] / "experiments" / "results" / "audit"
LEAST = 0.6  # of the claim, which the GDP bound must reach for the true code
TRUE = ("flat clip", "adaptive clip", "clip by layer", "zeroth order")


def train(
    kind: str, count: int, steps: int, seed: int, rate: float = 1.0
) -> tuple[AuditResult, np.ndarray, np.ndarray]:
    """Train on digits with canaries; return the audit, scores and coins.

    Args:
        kind: one of TRUE.
        count: of canaries.
        steps: of training.
        seed: of the draws.
        rate: the sample rate that the accountant knows, over 118/1437.
    """
    images, labels = load_digits(return_X_y=True)
    data = (torch.tensor(images[:1437] / 16, dtype=torch.float32), torch.tensor(labels[:1437]))
    rules: dict[str, ClipRule] = {"adaptive clip": Adaptive(1.0), "clip by layer": PerLayer(1.0)}
    clip = rules.get(kind, Flat(1.0))
    plan = PrivacyPlan.calibrate(
        epsilon=8,
        delta=1e-5,
        dataset_size=1437,
        batch_size=round(118 * rate),
        steps=steps,
        seed=seed,
        count_noise=6.0 if kind == "adaptive clip" else 0.0,
    )
    torch.manual_seed(seed)
    hidden = [nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)]
    model = nn.Sequential(*(hidden if kind == "clip by layer" else [nn.Linear(64, 10)]))
    make = ZerothOrder if kind == "zeroth order" else PrivateGradient
    private = make(model, F.cross_entropy, plan, clip, canaries=Canaries(count))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01 if kind == "zeroth order" else 0.5)
    for batch in dpopt.poisson_batches(data, plan, micro_batch=192):
        private.backward(batch)
        optimizer.step()
    assert private.canaries is not None
    return private.canaries.audit(plan), private.canaries.scores.numpy(), private.canaries.included(plan).numpy()


def audited(name: str, count: int, steps: int, seed: int) -> tuple[str, AuditResult, np.ndarray, np.ndarray]:
    """Audit the true code, or a wrong version by its name, with all checks."""
    torch.set_num_threads(1)
    patches: list[Any] = []

    def put(target: Any, attribute: str, value: Any) -> None:
        patches.append(patch.object(target, attribute, value))
        patches[-1].start()

    try:
        mutant = next((mutant for mutant in MUTANTS if mutant.__name__ == name), None)
        if mutant is not None:
            mutant(put)
        kind = name if name in TRUE else TRUE[0]
        result, scores, included = train(kind, count, steps, seed, 0.5 if mutant is half_the_rate_accounted else 1.0)
        result.checks.update(small_checks())
    finally:
        for applied in reversed(patches):
            applied.stop()
    return name, result, scores, included


def as_expected(name: str, result: AuditResult) -> bool:
    """Tell whether the audit says of this version what it must say."""
    expected = next((by for mutant, by in MUTANTS.items() if mutant.__name__ == name), None)
    if expected is not None:
        return expected in result.refuted_by
    least = LEAST if name in TRUE[:2] else 0.0
    return not result.refuted_by and result.bounds["GDP"] >= least * result.epsilon


# The page.


def page(results: dict[str, AuditResult], arguments: argparse.Namespace, seconds: float) -> str:
    """Write the table as Markdown."""
    first = next(iter(results.values()))
    about = {mutant.__name__: mutant.__doc__ for mutant in MUTANTS}
    lines = [
        "# Audit of the true code and of wrong versions",
        "",
        f"Digits, a linear model, q = {118 / 1437:.3f}, {arguments.steps:,} steps, claim ε = {first.epsilon:.3g} at "
        f"δ = {first.delta:g}; {first.canaries:,} canaries; bounds at {1 - first.alpha:.0%} confidence each. "
        "[What an audit can show](../../../docs/audit.md).",
        "",
        "| version | one run: ε ≥ | f-DP: ε ≥ | GDP: ε ≥ | refuted by |",
        "|---|---|---|---|---|",
    ]
    for name, result in results.items():
        bounds = [f"{b:.2f}" for b in result.bounds.values()]
        if name in TRUE:
            bounds = [f"{bound:.2f} (ideal {result.ceilings[which]:.2f})" for which, bound in result.bounds.items()]
        title = f"true code, {name}" if name in TRUE else str(about[name]).rstrip(".")
        lines.append(f"| {title} | {' | '.join(bounds)} | {'; '.join(result.refuted_by) or 'nothing'} |")
    by_layer = results["clip by layer"].signal
    lines += [
        "",
        f"Clip by layer: a canary lies in one of {by_layer**-2:.0f} layers and is clipped to {by_layer:.3f} of the "
        "sensitivity; the ideal audit has that ceiling. Zeroth order: a canary is a slope, clipped and noised like the "
        "slope that is released.",
        "",
        f"Exact checks: {'; '.join((*CHECKS, EMPTY, VIEWS, PIECES))}.",
        "",
        "![ROC of the audits](audit.png)",
        "",
        f"Seed {arguments.seed}; {seconds:.0f} s in {arguments.jobs} processes on {processor()}; "
        f"noise version {NOISE_VERSION}; "
        f"{', '.join(f'{name} {version}' for name, version in versions().items())}. "
        f"Command: `python scripts/audit_mutants.py{' ' + shlex.join(sys.argv[1:]) if sys.argv[1:] else ''}`.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Audit all versions, write table and figure, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--canaries", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=OUT)
    arguments = parser.parse_args()
    began, names = time.perf_counter(), [*TRUE, *(mutant.__name__ for mutant in MUTANTS)]
    results: dict[str, AuditResult] = {}
    rates: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        work = [pool.submit(audited, name, arguments.canaries, arguments.steps, arguments.seed) for name in names]
        for future in work:
            name, result, scores, included = future.result()
            results[name], rates[name] = result, (scores, included)
            expected = "as expected" if as_expected(name, result) else "NOT AS EXPECTED"
            bounds = ", ".join(f"{b} {epsilon:.2f}" for b, epsilon in result.bounds.items())
            print(f"{name}: {bounds}; refuted by {result.refuted_by or 'nothing'}: {expected}", flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "table.md").write_text(page(results, arguments, time.perf_counter() - began))
    shown = {"true code": "flat clip", "true code, clip by layer": "clip by layer", "no noise": "no_noise"}
    shown |= {"half the noise": "half_the_noise", "half the rate accounted": "half_the_rate_accounted"}
    roc_figure(arguments.output / "audit.png", results[TRUE[0]], {label: rates[name] for label, name in shown.items()})
    return int(not all(as_expected(name, result) for name, result in results.items()))


if __name__ == "__main__":
    sys.exit(main())
