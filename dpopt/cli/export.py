"""Write a run's model to hand on: weights, classes, preprocessing, and its privacy card as a model card.

dpopt export runs/NAME model                     any model: for dpopt.load and dpopt predict
dpopt export runs/tickets-… model [--adapter]    a transformer: for plain transformers or peft, with its tokenizer

README.md is in the form of the Hugging Face hub's model cards. It names no license: add yours.
"""

from collections.abc import Sequence
from pathlib import Path

from dpopt.cli import verb_parser


def export(words: Sequence[str]) -> int:
    """Export a run's model; return the exit code."""
    parser = verb_parser("export", __doc__)
    parser.add_argument("run", type=Path, help="a run directory with a model.safetensors")
    parser.add_argument("folder", type=Path, help="where the model is written")
    parser.add_argument("--adapter", action="store_true", help="write the LoRA adapter alone, for peft")
    arguments = parser.parse_args(words)
    from dpopt.training.export import export as write

    write(arguments.run, arguments.folder, arguments.adapter)
    print(f"wrote {arguments.folder}: {', '.join(sorted(path.name for path in arguments.folder.iterdir()))}")
    return 0
