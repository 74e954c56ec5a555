"""Hydra's side of the configuration: check overrides, resolve values, turn a composition into a `Config`."""

import difflib
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from dpopt.config.schema import COMPONENTS, CONF, Config

ConfigStore.instance().store(name="schema", node=Config)


def by_epsilon(epsilon: float | None, values: Mapping[Any, Any], private: bool = True) -> Any:
    """`${by_epsilon:${epsilon},{1: a, 8: b}}` in a YAML: the value at the nearest ε, in ratio; for none, the last.

    `${by_epsilon:${epsilon},{1: a, 8: b, inf: c, none: d},${private}}` has values for the controls, too.
    """
    if not private and "none" in values:
        return values["none"]
    if epsilon is not None and float(epsilon) == math.inf and math.inf in values:
        return values[math.inf]
    known = sorted(key for key in values if key not in ("none", math.inf))
    if epsilon is None or not 0 < float(epsilon) < math.inf:  # Config refuses other values
        return values[known[-1]]
    return values[min(known, key=lambda other: abs(math.log(other / float(epsilon))))]


def program() -> str:
    """Return how this process trains: `dpopt train`, or `python run.py` in a checkout."""
    return "dpopt train" if Path(sys.argv[0]).stem == "dpopt" else "python run.py"


OmegaConf.register_new_resolver("by_epsilon", by_epsilon, replace=True)
OmegaConf.register_new_resolver("program", program, replace=True)


def check_overrides(words: Sequence[str], own: Sequence[Path] = ()) -> None:
    """Check the keys of overrides such as `epsilon=8` before Hydra reads them.

    Args:
        words: the overrides; flags among them are skipped.
        own: folders of configuration besides conf/, whose groups are known, too.

    Raises:
        ValueError: for one that is neither a key of the root nor a group, with what may have been meant; for words of
            earlier versions, with today's.
    """
    groups = [path.name for folder in (CONF, *own) for path in folder.iterdir() if path.is_dir()]
    known = {f.name for f in fields(Config)} | set(groups) | {"hydra"}
    for word in words:
        key, equals, value = word.partition("=")
        if (old := key.lstrip("+")) == "scale" or (old != key and old in ("experiment", "size")):
            new = "size" if old == "scale" else old
            raise ValueError(f"{key}= is now {new}=: {new}={value}")
        if old == "secure_rng":
            raise ValueError("secure_rng= is now randomness=: randomness=secret (the default) or randomness=research")
        root = re.split(r"[./@]", key)[0]
        if not equals or not root.isidentifier() or root in known:
            continue
        inside = [
            g for g in COMPONENTS if any(re.search(rf"^{root}:", p.read_text(), re.M) for p in CONF.glob(f"{g}/*"))
        ]
        meant = [f"{group}.{root}" for group in inside] or difflib.get_close_matches(root, known, 1)
        hint = f": did you mean {' or '.join(meant)}?" if meant else ""
        raise ValueError(f"{root} is no key{hint} ({program()} --help lists all of them)")


def with_weights(words: Sequence[str]) -> list[str]:
    """Let `model.weights=RUN` add the key, because any model can start from the weights of a run."""
    return [f"++{word}" if word.startswith("model.weights=") else word for word in words]


def from_hydra(cfg: DictConfig) -> Config:
    """Turn Hydra's composition into a checked Config.

    Raises:
        ValueError: for a key that is no field of Config, or values that contradict each other.
    """
    known = {f.name for f in fields(Config)}
    unknown = [str(key) for key in cfg if key not in known]
    if unknown:
        raise ValueError(f"unknown key {unknown[0]}: the keys are {', '.join(sorted(known))}")
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, Config)
    return config
