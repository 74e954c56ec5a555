"""Checkpoints: everything that a bit-exact resume needs, written atomically, read without unpickling code.

Randomness needs no saved state: every draw is keyed by the step.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from dpopt.files import replace_durably, writing


def save(path: Path, step: int, facts: dict[str, Any], parts: dict[str, Any], progress: dict[str, Any]) -> None:
    """Write a checkpoint after `step` steps.

    Args:
        path: the file.
        step: number of steps taken.
        facts: plain values that must be equal when the run resumes (configuration, plan, data fingerprint).
        parts: objects with a state_dict (model, optimizer, weight average, schedule).
        progress: plain values to go on with (wall time, length of metrics.csv).
    """
    states = {name: part.state_dict() for name, part in parts.items()}
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        torch.save({"step": step, "facts": facts, "parts": states, "progress": progress}, temporary)
        replace_durably(temporary, path)


def load(path: Path, facts: dict[str, Any], parts: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Restore the parts in place; return the number of steps taken and the progress.

    Raises:
        ValueError: when the file is damaged or belongs to other facts; it is left untouched.
    """
    advice = "move it away, or start again with fresh=true"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        step, stored, states = int(content["step"]), content["facts"], content["parts"]
        progress = dict(content["progress"])
    except (RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError, OSError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}): {advice}") from error
    for name, value in facts.items():
        if stored.get(name) != value:
            raise ValueError(
                f"{path} was written by a run with another {name.replace('_', ' ')}: restore that, or start again with "
                "fresh=true"
            )
    try:
        for name, part in parts.items():
            part.load_state_dict(states[name])
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} does not fit this model or optimizer ({error}): {advice}") from error
    return step, progress


def export(path: Path, model: nn.Module) -> None:
    """Write a model's weights atomically, readable by whoever may read new files here."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file({name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}, temporary)
        temporary.chmod(mode)  # save_file lets nobody else read
        replace_durably(temporary, path)
