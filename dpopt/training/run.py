"""One run, from its configuration to its result.

What can be refused is refused before `directory.lock` makes the run's directory.
"""

from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dpopt import files, ranks
from dpopt.config.components import check_components, estimator_takes
from dpopt.config.schema import Config
from dpopt.data.fingerprint import FingerprintKey, combine
from dpopt.data.views import check_views
from dpopt.runs import console, directory
from dpopt.runs.audit_report import audit_table, read_audit
from dpopt.runs.identity import describe, failure_note, locate
from dpopt.runs.provenance import git_commit
from dpopt.runs.result import Estimate
from dpopt.runs.tracking import log_finished
from dpopt.training.build import Components, build_components, make_task, make_tracker
from dpopt.training.cost import estimate_cost, keep_freed_memory
from dpopt.training.distributed import Watch, process_group
from dpopt.training.loading import load_data
from dpopt.training.trainer import Trainer


def run(config: Config) -> dict[str, Any]:
    """Train the configured run, resume it, or print its result if it has finished.

    Processes that `torchrun` started train it together; files and console belong to rank 0.

    Returns:
        The result, as in result.json. For a dry run: the estimated `seconds` and `memory_bytes`, and as `status`
        "finished" if the run already has a result, else "planned".

    Raises:
        ValueError: for a configuration that cannot be trained as asked.
        OSError: for missing files, or a rank that has stopped.
        KeyboardInterrupt: after Ctrl-C, when the trainer has saved its state.
    """
    with process_group(config.device) as watch:
        result = _run(config, watch)
    if result["status"] == "interrupted":
        raise KeyboardInterrupt  # so that a sweep stops, too
    return result


def _run(config: Config, watch: Watch | None) -> dict[str, Any]:
    commit = git_commit()  # at once: the checkout may change while this runs
    _compare_ranks(config)
    check_components(config)
    path, first = locate(config), ranks.is_first()
    done = ranks.from_first(lambda: directory.finished(path))
    if done and not config.fresh and not config.dry_run:
        if first:
            directory.erase_key(path)  # a run killed right after it wrote its result has kept its secret key
            _clear(path, fresh=False)  # and says why, where another rank was killed
            note = _compare_data(config, done, str(path))
            console.already_finished(done, str(path), commit, note)
            log_finished(path / directory.METRICS, make_tracker(config), path.name, asdict(config))
            _print_audit(path)
        ranks.wait()
        return done

    keep_freed_memory()
    components = build_components(config)
    data = None if config.dry_run else load_data(config, components.task.spec, components.device)
    about = describe(config)
    if data is not None:
        check_views(data.train, config.views, about.dataset)
        components.task.check_source(components.model, data.train)
    guess = ranks.from_first(lambda: _estimate(components))
    panel = partial(console.plan_panel, about, components.plan, components.clip, guess, components.engine)
    if data is None:
        ranks.from_first(panel)
        return {"status": "finished" if done else "planned", **asdict(guess)}

    with directory.lock(path) if first else nullcontext():
        try:
            # Another process may have finished this run since we looked.
            if (done := ranks.from_first(lambda: directory.finished(path))) and not config.fresh:
                if first:
                    console.already_finished(done, str(path), commit, "")
                return done
            if first:
                _clear(path, config.fresh)
                panel()
            ranks.wait()
            fitted = Trainer(components, data, path).fit()
            result = ranks.from_first(lambda: fitted.to_json() if fitted else {})
        except Exception as error:
            error = error if watch is None else watch.explained(error)
            if first:
                with suppress(OSError):  # never mask the original error
                    files.write_atomic(path / directory.ERROR, f"{type(error).__name__}: {error}\n")
            raise error
    if first:
        console.result_panel(result, str(path), config.fresh)
        _print_audit(path)
    return result


def _compare_ranks(config: Config) -> None:
    """Refuse ranks that were started with different commands; `data_dir` may differ."""
    command = combine(str(sorted((asdict(config) | {"data_dir": ""}).items())))
    if (difference := ranks.first_difference({"configuration": command})) is not None:
        raise ValueError(f"rank {difference[0]} has another configuration than rank 0: start all with the same command")


def _clear(path: Path, fresh: bool) -> None:
    """Delete what an earlier try has left: its error and, for a fresh start, everything."""
    if fresh:
        directory.clear(path)
    (path / directory.ERROR).unlink(missing_ok=True)


def _compare_data(config: Config, done: dict[str, Any], path: str) -> str:
    """Compare the data of a finished run with those that are here; return why that was impossible, or "".

    Raises:
        ValueError: when the data have changed, so that an outdated result is not shown as current.
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
    gradients_per_step = 1 if components.filter is None else components.filter.cost
    guess = estimate_cost(
        components.engine,
        components.make_optimizer,
        components.plan,
        components.example,
        components.micro_batch,
        components.config.ema is not None,
        gradients_per_step,
    )
    if estimator_takes(components.config) in ("features", "updates"):
        return replace(guess, seconds=None, memory_bytes=None)  # what was measured is the cost of gradients
    # The ranks share the work.
    return guess if guess.seconds is None else replace(guess, seconds=guess.seconds / ranks.share().world)


def note_failure(config: Config, error: Exception) -> None:
    """Record why a run could not begin, for the table of its sweep; a dry run records nothing."""
    if not config.dry_run:
        directory.note_failure(failure_note(config), error)
