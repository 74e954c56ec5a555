"""What a run returns: its result, or for a dry run what it would cost."""

from dataclasses import asdict, dataclass
from typing import Any

HOLDOUT = "private/holdout_accuracy"  # in result.json, where there is one
REPRODUCIBLE = "reproducible noise: no guarantee against those who know the seed"


@dataclass(frozen=True)
class Result:
    """The outcome of a run, as in result.json.

    Attributes:
        status: `finished`, `interrupted` or `time_limit`.
        run: name of the run.
        metrics: of the test set, `test_accuracy` in [0, 1] and `test_loss` in nats; of a hold-out where diagnostics
            were recorded, `private/holdout_accuracy`.
        guarantee: what the run may claim, in a sentence.
        noise_version: how randomness was drawn and released (`dpopt.privacy.noise`).
        data_mac: MAC of the fingerprint of the training set, of its settings and of what is held out.
        records_mac: MAC of the fingerprint of all its records, under which the ledger adds up runs.
        fingerprint_key: names the key of the MAC.
        epsilon: spent, by the plan's accountant.
        epsilon_rdp: spent, by Rényi accounting.
        accountant: of the plan.
        steps: taken.
        planned_steps: of the plan.
        plan: the rest of the plan, as plain values.
        parameters: number of parameters.
        trainable_parameters: number of those that were trained.
        optimizer_state_bytes: of the optimizer.
        adam_state_bytes: of Adam on the same parameters.
        peak_memory_bytes: allocated on a GPU, resident in the whole process on a CPU.
        examples_per_second: expected examples over the time of training steps.
        wall_seconds: of all processes that worked on the run.
        seed: of the configuration.
        git_commit: of the code; None outside a checkout.
        versions: of Python and libraries.
        device: its name.
        config: the whole configuration.
        classes: their names, in the order of the outputs; empty where outputs are no classes.
        releases: noise multiplier, sample rate and number of the Gaussians that the run's releases compose.
    """

    status: str
    run: str
    metrics: dict[str, float]
    guarantee: str
    noise_version: int
    data_mac: str
    records_mac: str
    fingerprint_key: str
    epsilon: float
    epsilon_rdp: float
    accountant: str
    steps: int
    planned_steps: int
    plan: dict[str, Any]
    parameters: int
    trainable_parameters: int
    optimizer_state_bytes: int
    adam_state_bytes: int
    peak_memory_bytes: int
    examples_per_second: float
    wall_seconds: float
    seed: int
    git_commit: str | None
    versions: dict[str, str]
    device: str
    config: dict[str, Any]
    classes: list[str]
    releases: list[list[float]]

    def to_json(self) -> dict[str, Any]:
        """Flatten to the keys of result.json."""
        values: dict[str, Any] = {}
        for name, value in asdict(self).items():
            values |= value if name in ("metrics", "plan") else {name: value}
        return values


@dataclass(frozen=True)
class Estimate:
    """What a run will take: bytes and seconds.

    Attributes:
        parameters: number of trainable parameters.
        optimizer_state_bytes: of the optimizer in question, counted by one step on shapes without memory.
        adam_state_bytes: of Adam on the same parameters, for comparison.
        memory_bytes: parameters, sums, optimizer state, weight average, and activations and per-sample gradients of a
            micro-batch.
        micro_batch: examples of a micro-batch.
        seconds: for all steps, from one timed micro-batch; None when it could not be timed.
    """

    parameters: int
    optimizer_state_bytes: int | None
    adam_state_bytes: int
    memory_bytes: int | None
    micro_batch: int
    seconds: float | None
