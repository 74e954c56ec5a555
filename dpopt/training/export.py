"""A run's model to hand on: weights, classes, preprocessing, and its privacy card as a model card of the hub."""

import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from dpopt import files
from dpopt.config.schema import Config
from dpopt.data.datasets import DataSpec
from dpopt.data.inputs import class_names
from dpopt.models.transformer import Transformer, load_tokenizer, write
from dpopt.runs.directory import CARD, CARD_PAGE, CONFIG, PREPROCESSING, RESULT, WEIGHTS, read_config
from dpopt.runs.identity import describe
from dpopt.runs.markdown import code, plain
from dpopt.training.build import make_task
from dpopt.training.finished import load

_README = "README.md"


def export(run: Path, folder: Path, adapter: bool = False) -> None:
    """Write a run's model, its card and what is needed to use it into a new folder.

    A transformer is written for plain `transformers` or `peft`, any other model for `dpopt.load`.

    Args:
        run: the run directory.
        folder: new or empty.
        adapter: write the LoRA adapter of a transformer alone.

    Raises:
        ValueError: for a folder that holds something, a run without a model, or an adapter that there is not.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: name a new folder")
    model, config = load(run), read_config(run)
    spec, result = make_task(config).spec, files.read_json(run / RESULT)
    if isinstance(model, Transformer):
        write(model, folder, adapter)
        if tokenizer := config.dataset.get("tokenizer"):
            load_tokenizer(tokenizer).save_pretrained(folder)
        library = "peft" if adapter else "transformers"
    elif adapter:
        raise ValueError(f"{run} holds no transformer, which alone has adapters: leave --adapter out")
    else:
        _write_own(run, folder, config, spec, result)
        library = "dpopt"
    for name in (CARD, CARD_PAGE):
        if (run / name).exists():
            shutil.copyfile(run / name, folder / name)
    files.write_atomic(folder / _README, _readme(run, config, spec, library))


def _write_own(run: Path, folder: Path, config: Config, spec: DataSpec, result: dict[str, Any]) -> None:
    """Write what `dpopt.load` and `dpopt predict` read."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run / WEIGHTS, folder / WEIGHTS)
    values = asdict(replace(config, data_dir="data", output_dir="runs"))
    (folder / CONFIG).write_text(yaml.safe_dump(_without_folders(values), sort_keys=False, allow_unicode=True))
    names = class_names(result.get("classes") or spec.class_names, spec.classes)
    inputs = spec.inputs.to_json() if hasattr(spec.inputs, "to_json") else {"constants": spec.constants}
    files.write_json(folder / PREPROCESSING, {"classes": names, "inputs": {"shape": list(spec.shape)} | inputs})


def _without_folders(value: Any) -> Any:
    """Reduce absolute paths of this machine to their last part."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _readme(run: Path, config: Config, spec: DataSpec, library: str) -> str:
    """Write the model card: YAML that the hub reads, how to use the model, and the privacy card."""
    result, about = files.read_json(run / RESULT), describe(config)
    accuracy, tested = result.get("test_accuracy"), f"on the test set of {code(about.dataset)}"
    lines = [
        f"---\n{yaml.safe_dump(_front_matter(result, spec, library), sort_keys=False, allow_unicode=True)}---",
        "",
        f"# {plain(about.name)}",
        "",
        f"{code(about.model)}, trained on {code(about.dataset)} by dpopt: {plain(result.get('guarantee', 'unknown'))}.",
        "",
        *([f"Accuracy {accuracy:.2%} {tested}, which ε does not protect.", ""] if accuracy is not None else []),
        *_use(library, getattr(spec.inputs, "reads", "image")),
        "",
    ]
    card = (run / CARD).read_text() if (run / CARD).exists() else ""
    return "\n".join([*lines, ""]) + re.sub(r"(?m)^#", "##", card)


def _front_matter(result: dict[str, Any], spec: DataSpec, library: str) -> dict[str, Any]:
    """Collect what the hub indexes, and the numbers of the guarantee."""
    kinds = {"sequence_classification": "text-classification", "language_modeling": "text-generation"}
    names = (
        "epsilon",
        "delta",
        "accountant",
        "noise_multiplier",
        "sample_rate",
        "steps",
        "dataset_size",
        "statistics_noise",
    )
    protected = not str(result.get("guarantee", "none")).startswith("none")
    privacy = {name: result[name] for name in names if protected and name in result}
    kind = kinds.get(spec.task, "image-classification" if len(spec.shape) == 3 else None)
    return {
        "library_name": library,
        **({"pipeline_tag": kind} if kind else {}),
        "tags": ["differential-privacy", "dpopt", spec.name],
        "privacy": {
            "guarantee": result.get("guarantee", "unknown"),
            **({"unit": spec.unit, "neighbors": "one record added or removed"} if protected else {}),
            **privacy,
        },
    }


def _use(library: str, reads: str) -> list[str]:
    if library != "dpopt":
        return [f"It loads with plain `{library}`; a new head lies in `head.safetensors`, where there is one."]
    images, rows = "IMAGES` names the classes of new images", "TABLE.csv` names the class of every row"
    new = rows if reads == "row" else images
    return [
        "```python",
        "import dpopt",
        "",
        'model = dpopt.load("FOLDER")  # this folder',
        "```",
        "",
        f"`dpopt predict FOLDER {new}, prepared as the test set was (`{PREPROCESSING}`).",
    ]
