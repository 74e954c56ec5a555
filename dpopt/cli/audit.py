"""Audit a run: compare the ε that it claims with what canaries in its data can be told by.

dpopt audit experiment=quickstart epsilon=8     train an audited run and print the table
dpopt audit runs/NAME                           print the audit of a run; train it again, audited, if it has none
dpopt audit --black-box runs/NAME               look at a finished run's model alone (needs holdout=…)

The overrides are those of `dpopt train`; audit=2000 takes 2,000 canaries instead of 10,000. The exit code is 1 if a
bound exceeds the claim or an exact check fails. docs/audit.md says what an audit can show.

The black-box audit compares the model's loss on training examples with its loss on held-out ones, without canaries. It
is weak: real examples are easy to learn together, and one final model shows next to nothing of each.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dpopt.cli import verb_parser
from dpopt.config.schema import CONF, Config


def audit(words: Sequence[str]) -> int:
    """Audit a run directory, or the run that overrides name; return the exit code."""
    parser = verb_parser("audit", __doc__)
    parser.add_argument("run", nargs="+", help="a run directory, or overrides as of dpopt train")
    parser.add_argument("--black-box", action="store_true", help="see only the final model of a finished run")
    arguments = parser.parse_args(words)
    if arguments.black_box:
        print(_black_box(Path(arguments.run[0])))
        return 0
    return _white_box(arguments.run)


def _white_box(words: Sequence[str]) -> int:
    """Print the audit of a run, after training it if need be."""
    from dpopt.runs.audit_report import audit_table, read_audit
    from dpopt.runs.directory import read_config
    from dpopt.runs.identity import locate
    from dpopt.training.run import run

    directory = Path(words[0])
    if directory.is_dir():
        if (found := read_audit(directory)) is not None:
            print(audit_table(found, directory.name))
            return int(bool(found.refuted_by))
        config = replace(read_config(directory), audit=True, output_dir=str(directory.parent), fresh=False)
    else:
        config = _compose(words)
        config = config if config.audit else replace(config, audit=True)
    run(config)  # prints the table
    found = read_audit(locate(config))
    return int(found is not None and bool(found.refuted_by))


def _compose(words: Sequence[str]) -> Config:
    """Compose the configuration of one run.

    Raises:
        ValueError: for unknown keys or a bad configuration.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from dpopt.cli.refusals import sentence
    from dpopt.config.overrides import check_overrides, from_hydra, with_weights

    check_overrides(words)
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return from_hydra(compose("config", with_weights(words)))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(sentence(error)) from error


def _black_box(directory: Path) -> str:
    """Bound ε from the losses of a finished run's model on training and held-out examples.

    Raises:
        ValueError: for a run without a model or a hold-out.
    """
    import torch

    import dpopt
    from dpopt import files
    from dpopt.privacy.audit import gaussian_dp_bound
    from dpopt.runs.directory import RESULT, read_config
    from dpopt.training.build import make_task
    from dpopt.training.loading import load_data

    model, config = dpopt.load(directory), read_config(directory)
    if not config.holdout:
        raise ValueError(f"{directory} trained on all examples: the black-box audit needs a run with holdout=0.1, say")
    task = make_task(config)
    data = load_data(config, task.spec, torch.device("cpu"))
    assert data.held_out is not None
    loss = torch.func.vmap(lambda output, target: task.loss_fn(output[None], target[None]))
    like, losses = next(model.parameters()), []
    with torch.no_grad():
        for source in (data.train, data.held_out):
            rows = ((x.to(like) if x.is_floating_point() else x, y) for x, y in source.plain(task.at_once))
            losses.append(torch.cat([loss(model(x), y).double() for x, y in rows]))
    included = torch.cat([torch.full((len(found),), number == 0) for number, found in enumerate(losses)])
    bound = gaussian_dp_bound(-torch.cat(losses).numpy(), included.numpy(), config.delta)
    result = files.read_json(directory / RESULT)
    return (
        f"black box: ε ≥ {bound:.2f} at δ = {config.delta:g} from {len(losses[0]):,} training and {len(losses[1]):,} "
        f"held-out examples; the claim is ε = {result.get('epsilon', float('nan')):.4g}. This sees next to nothing: it "
        "can refute no realistic claim, and a small bound says nothing for the run. It reads training and held-out "
        "data exactly, outside ε: do not publish it."
    )
