"""Evaluate a finished run's model on the test set of its dataset.

dpopt evaluate runs/digits-cnn-microadam-eps8-seed0-… [DATA_DIR] [--write 64]
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpopt.cli import verb_parser

_SHOWN = 3  # texts


def evaluate(words: Sequence[str]) -> int:
    """Print test accuracy and loss of a finished run's model; return the exit code."""
    parser = verb_parser("evaluate", __doc__)
    parser.add_argument("run", type=Path, help="a run directory with a model.safetensors")
    parser.add_argument(
        "data_dir", nargs="?", help="where the dataset is; by default where the run found it, else DPOPT_DATA_DIR"
    )
    parser.add_argument(
        "--write", type=int, metavar="N", help="let a language model complete N prompts of the test set"
    )
    parser.add_argument(
        "--beams", type=int, help="of the search that writes (1, the default: the likeliest token each time)"
    )
    arguments = parser.parse_args(words)
    print("\n".join(_measure(arguments.run, arguments.data_dir, arguments.write, arguments.beams)))
    return 0


def _measure(run: Path, data_dir: str | None, count: int | None, beams: int | None) -> list[str]:
    """Load a run's model and test set; say the metrics."""
    if beams is not None and count is None:
        raise ValueError(f"--beams {beams} is of the search that --write starts: add --write N, or leave it out")
    import dpopt
    from dpopt.runs.directory import read_config
    from dpopt.training import trainer
    from dpopt.training.build import make_task
    from dpopt.training.finished import load_test_set

    model = dpopt.load(run)
    config = read_config(run)
    if data_dir is None:
        known = Path(config.data_dir).exists()
        data_dir = config.data_dir if known else os.environ.get("DPOPT_DATA_DIR", config.data_dir)
    config = replace(config, data_dir=data_dir.removeprefix("data_dir="))
    task = make_task(config)
    test = load_test_set(config, task)
    if count is not None:
        return _write(model, config.dataset.get("tokenizer"), test, count, 1 if beams is None else beams)
    values = trainer.evaluate(model, task, test, config.precision)
    return [f"accuracy {values['accuracy']:.4%}, loss {values['loss']:.6f}"]


def _write(model: Any, tokenizer: str | None, test: Any, count: int, beams: int) -> list[str]:
    """Let the model write; say how near that is to what people wrote, and show some of it."""
    from dpopt.models.transformer import Transformer, load_tokenizer
    from dpopt.tasks.generation import closeness, write_texts

    if not isinstance(model, Transformer) or model.head is not None or tokenizer is None or test.targets.ndim != 2:
        raise ValueError("--write needs a run of a language model, on dataset=e2e for instance: leave it out")
    if count < 1 or beams < 1:
        raise ValueError(f"--write {count} --beams {beams}: give numbers of at least 1")
    written = write_texts(model, load_tokenizer(tokenizer), test, count, beams)
    values = closeness(written)
    lines = [f"BLEU {values['bleu']:.2f}, ROUGE-L {values['rouge_l']:.4f} over {len(written):,} prompts"]
    for example in written[:_SHOWN]:
        lines += ["", f"prompt  {example.prompt}", f"model   {example.text}", f"people  {example.references[0]}"]
    return lines
