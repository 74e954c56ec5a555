"""Initial weights from an earlier run: `model.weights=RUN`, the directory of a run on other data.

ε of a run covers its own dataset. So the data of the earlier run, and of those before it, must be others: a private run
on the same dataset is refused, by the names of the datasets and by the MACs of their fingerprints. The head belongs to
the classes of a dataset; it is drawn again where the dataset is another.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dpopt import files, ranks
from dpopt.config.components import accepted, component_defaults, locate_target
from dpopt.config.schema import Config
from dpopt.data.datasets import DataSpec
from dpopt.data.fingerprint import FingerprintKey
from dpopt.data.pretraining import check_pretraining, same_records
from dpopt.models.pretrained import describe_weights
from dpopt.runs.directory import RESULT, WEIGHTS, read_config
from dpopt.runs.tracking import warn


@dataclass(frozen=True)
class EarlierRun:
    """A run whose weights another one starts from.

    Attributes:
        directory: where it lies.
        result: as in its result.json.
        spec: its dataset, not loaded.
        model: the arguments of its model, defaults included.
    """

    directory: Path
    result: dict[str, Any]
    spec: DataSpec
    model: Mapping[str, Any]

    def describe(self) -> str:
        """Say what it was trained on, and under which guarantee."""
        epsilon, private = self.result["epsilon"], self.result["config"].get("private", True)
        how = f"with ({epsilon:.4g}, {self.result['delta']:g})-differential privacy" if private else "without privacy"
        return f"run {self.result['run']}, trained {how} on {self.spec.name}, which ε here does not cover"


def model_node(config: Config) -> dict[str, Any]:
    """Collect the arguments of a configuration's model, defaults included."""
    return component_defaults(config.model) | config.model


def dataset_spec(config: Config) -> DataSpec:
    """Describe the dataset of a configuration."""
    arguments = {key: value for key, value in config.dataset.items() if not key.startswith("_")}
    spec: DataSpec = locate_target("dataset", config.dataset)(**arguments)
    return spec


def earlier_runs(node: Mapping[str, Any]) -> list[EarlierRun]:
    """List the runs that a model's weights come from, the latest first.

    Raises:
        ValueError: when an earlier run of the chain is gone, so that nobody knows its data.
    """
    found: list[EarlierRun] = []
    while node.get("weights") and (directory := Path(str(node["weights"])).expanduser()).is_dir():
        config = read_config(directory)
        spec = dataset_spec(config)
        found.append(EarlierRun(directory, files.read_json(directory / RESULT), spec, model_node(config)))
        node = found[-1].model
        if node.get("weights") and not Path(str(node["weights"])).expanduser().exists():
            raise ValueError(
                f"run {found[-1].result['run']} began with the weights {node['weights']}, which are gone, so their "
                "data cannot be told from those of this run: put them back, or start from another run"
            )
    return found


def check_initial_weights(config: Config, spec: DataSpec, classes: Sequence[str] = ()) -> None:
    """Check that no weights that a private run starts from were trained on its dataset, by name.

    Raises:
        ValueError: naming both.
    """
    node: Mapping[str, Any] = model_node(config)
    for run in earlier_runs(node):
        if same_records(run.spec, spec):
            raise _same(run, f"{run.spec.name}, as {spec.name} here")
        node = run.model
    check_pretraining(spec, node, classes)


def check_fingerprint(config: Config, fingerprints: Collection[str]) -> None:
    """Check the same by the datasets' fingerprints, where both were recorded under this user's key.

    Raises:
        ValueError: naming the run.
    """
    runs = earlier_runs(model_node(config))
    key = FingerprintKey.load() if runs else None
    for run in runs:
        macs = [] if key is None or run.result.get("fingerprint_key") != key.key_id else map(key.mac, fingerprints)
        if {run.result["data_mac"], run.result.get("records_mac")} & set(macs):
            raise _same(run, "the very dataset of this run, by its fingerprint")


def _same(run: EarlierRun, data: str) -> ValueError:
    return ValueError(
        f"the initial weights come from run {run.result['run']}, trained on {data}, so ε would not cover what they "
        "know of it: start from a run on other data, or from random weights (drop model.weights)"
    )


def describe_initial_weights(config: Config) -> str:
    """Say where a model's initial weights come from, run by run, for the privacy card."""
    node: Mapping[str, Any] = model_node(config)
    runs = earlier_runs(node)
    if not runs:
        return describe_weights(node)
    head = "; head drawn at random by the seed" if runs[0].spec.name != dataset_spec(config).name else ""
    return "; before that ".join([*(run.describe() for run in runs), describe_weights(runs[-1].model)]) + head


def split_weights(node: Mapping[str, Any], offline: bool) -> tuple[dict[str, Any], list[EarlierRun]]:
    """Split a model's arguments into what builds it, and the runs that its weights come from."""
    runs = [] if offline else earlier_runs(component_defaults(node) | dict(node))
    takes_file = accepted(locate_target("model", node), ["weights"])
    return {key: v for key, v in node.items() if key != "weights" or (takes_file and not runs)}, runs


def load_run(model: nn.Module, run: EarlierRun, keep_head: bool) -> None:
    """Copy the weights of a run into a model of the same layers.

    Raises:
        ValueError: for weights that do not fit, naming the first; the head need not.
    """
    from safetensors.torch import load_file

    stored, own = load_file(run.directory / WEIGHTS), model.state_dict()
    head = [name for name, _ in model.named_parameters()][-1].rpartition(".")[0]
    news = {name for name in own if name.startswith(f"{head}.")}
    unlike = sorted(
        n for n in stored.keys() | own if n not in stored or n not in own or stored[n].shape != own[n].shape
    )
    if wrong := [name for name in unlike if name not in news]:
        raise ValueError(
            f"the weights of run {run.result['run']} do not fit this model ({wrong[0]}): give both runs the same model "
            "arguments and images of the same channels"
        )
    news = set() if keep_head and not unlike else news
    model.load_state_dict({name: own[name] if name in news else stored[name] for name in own})
    if news and ranks.is_first():
        warn(f"weights of run {run.result['run']}, trained on {run.spec.name}; the head {head} is new")
