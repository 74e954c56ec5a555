"""Write a run's transformer so that plain transformers loads it, with its tokenizer and its privacy card.

dpopt export runs/tickets-… tickets-model [--adapter]
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path


def export(words: Sequence[str]) -> int:
    """Export a run's model; return the exit code."""
    parser = argparse.ArgumentParser("dpopt export", description="Write a run's model for transformers or peft.")
    parser.add_argument("run", type=Path, help="a run directory with a model.safetensors")
    parser.add_argument("folder", type=Path, help="where the model is written")
    parser.add_argument("--adapter", action="store_true", help="write the LoRA adapter alone, for peft")
    arguments = parser.parse_args(words)
    try:
        _write(arguments.run, arguments.folder, arguments.adapter)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"wrote {arguments.folder}: {', '.join(sorted(path.name for path in arguments.folder.iterdir()))}")
    return 0


def _write(run: Path, folder: Path, adapter: bool) -> None:
    import dpopt
    from dpopt.models.transformer import Transformer, load_tokenizer, write
    from dpopt.runs.directory import CARD, read_config

    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: name a new folder")
    model = dpopt.load(run)
    if not isinstance(model, Transformer):
        raise ValueError(f"{run} holds no transformer: read it by dpopt.load, or its model.safetensors")
    write(model, folder, adapter)
    if tokenizer := read_config(run).dataset.get("tokenizer"):
        load_tokenizer(tokenizer).save_pretrained(folder)
    shutil.copyfile(run / CARD, folder / CARD)
