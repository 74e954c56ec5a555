"""One run, from its configuration to its result.

Everything that can be refused is refused before the run directory is made.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dpopt import files
from dpopt.config.components import check_components
from dpopt.config.schema import Config
from dpopt.data.fingerprint import FingerprintKey
from dpopt.data.views import check_views
from dpopt.runs import console, directory
from dpopt.runs.audit_report import audit_table, read_audit
from dpopt.runs.identity import describe, failure_note, locate
from dpopt.runs.provenance import git_commit
from dpopt.runs.result import Estimate
from dpopt.runs.tracking import log_finished
from dpopt.training.build import Components, build_components, load_data, make_task, make_tracker
from dpopt.training.cost import estimate_cost, keep_freed_memory
from dpopt.training.trainer import Trainer


def run(config: Config) -> dict[str, Any]:
    """Train the configured run, resume it, or print its result if it has finished.

    Returns:
        The result, as in result.json; for a dry run, the estimated `seconds` and `memory_bytes`, and as `status`
        "planned", or "finished" where there is a result.

    Raises:
        ValueError: for a configuration that cannot be trained as asked; OSError for missing files.
    """
    commit = git_commit()  # before anything that takes long
    check_components(config)
    path = locate(config)
    done = directory.finished(path)
    if done and not config.fresh and not config.dry_run:
        console.already_finished(done, str(path), commit, _compare_data(config, done, str(path)))
        log_finished(path / directory.METRICS, make_tracker(config), path.name, asdict(config))
        _print_audit(path)
        return done

    keep_freed_memory()
    components = build_components(config)
    about = describe(config)
    data = None if config.dry_run else load_data(config, components.task.spec, components.device)
    if data is not None:
        check_views(data.train, config.views, about.dataset)
    guess = _estimate(components)
    if data is None:
        console.plan_panel(about, components.plan, components.clip, guess, components.engine)
        return {"status": "finished" if done else "planned", **asdict(guess)}

    with directory.lock(path):
        try:
            if (done := directory.finished(path)) and not config.fresh:  # by another process, in the meantime
                console.already_finished(done, str(path), commit, "")
                return done
            if config.fresh:
                directory.clear(path)
            (path / directory.ERROR).unlink(missing_ok=True)
            console.plan_panel(about, components.plan, components.clip, guess, components.engine)
            result = Trainer(components, data, path).fit().to_json()
        except Exception as error:
            files.write_atomic(path / directory.ERROR, f"{type(error).__name__}: {error}\n")
            raise
    console.result_panel(result, str(path), config.fresh)
    _print_audit(path)
    if result["status"] == "interrupted":
        raise KeyboardInterrupt  # the user wants the whole sweep to stop
    return result


def _compare_data(config: Config, done: dict[str, Any], path: str) -> str:
    """Compare the data of a finished run with those that are here; say why where that cannot be done.

    Raises:
        ValueError: when the data have changed: the result must not pass for today's.
    """
    key = FingerprintKey.load()
    if done.get("fingerprint_key") != key.key_id:
        return "its data were not compared: they are recorded under another fingerprint key, or by an earlier version"
    try:
        data = load_data(config, make_task(config).spec, torch.device("cpu"))
    except OSError as error:
        return f"its data were not compared: {error}"
    if key.mac(data.fingerprint) != done.get("data_mac"):
        raise ValueError(
            f"{path} was trained on other data than there are now, so its result is out of date: fresh=true trains it "
            "again, tag=NAME makes another run"
        )
    return ""


def _print_audit(path: Path) -> None:
    if (audit := read_audit(path)) is not None:
        print(audit_table(audit, path.name))


def _estimate(components: Components) -> Estimate:
    gradients = 1 if components.filter is None else components.filter.cost
    return estimate_cost(
        components.engine,
        components.make_optimizer,
        components.plan,
        components.example,
        components.micro_batch,
        components.config.ema is not None,
        gradients,
    )


def note_failure(config: Config, error: Exception) -> None:
    """Record why a run could not begin, for the table of its sweep; a dry run records nothing."""
    if not config.dry_run:
        directory.note_failure(failure_note(config), error)
