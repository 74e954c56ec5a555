"""The one class that trains: a step, an evaluation, a checkpoint, and the loop that runs them.

The directory of a run always holds a state from which the same command continues, or the finished result.
"""

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dpopt import files, ranks
from dpopt.data.fingerprint import FingerprintKey, home
from dpopt.data.inputs import class_names
from dpopt.data.sources import TensorSource
from dpopt.models.layers import set_statistics
from dpopt.optim.step_metrics import StepMetrics
from dpopt.privacy.agreement import check_weights
from dpopt.privacy.audit import AuditResult
from dpopt.privacy.canaries import Canaries
from dpopt.privacy.clipping import Adaptive
from dpopt.privacy.noise import NOISE_VERSION
from dpopt.privacy.sampling import PoissonBatch, poisson_batches
from dpopt.privacy.statistics import release_statistics
from dpopt.rng import RandomKey
from dpopt.runs import directory as run_files
from dpopt.runs.audit_report import write_audit
from dpopt.runs.console import Progress
from dpopt.runs.identity import component_strings, describe, identity, identity_hash, is_secret
from dpopt.runs.ledger import Ledger, Spending, describe_total, spending
from dpopt.runs.origin import code_rows, data_row, initial_file, weights_row
from dpopt.runs.privacy_card import CardFacts, guarantee, privacy_card, write_card
from dpopt.runs.provenance import code_hash, device_name, git_commit, versions
from dpopt.runs.result import HOLDOUT, Result
from dpopt.runs.tracking import Metrics, warn
from dpopt.training import checkpoint
from dpopt.training.build import Components, make_tracker
from dpopt.training.cost import optimizer_state_bytes, peak_memory_bytes, reset_peak_memory
from dpopt.training.evaluation import evaluate
from dpopt.training.loading import Data
from dpopt.training.signals import stop_signals


class Trainer:
    """Trains a run's components on its data, inside its directory, which belongs to rank 0.

    Args:
        components: built by `build_components`.
        data: loaded by `load_data`.
        directory: of the run, locked by rank 0.

    Raises:
        ValueError: when the directory holds a checkpoint of another run, or a damaged one.
    """

    def __init__(self, components: Components, data: Data, directory: Path) -> None:
        self.config, self.data, self.directory = components.config, data, directory
        self.components, self.about = components, describe(components.config)
        self.model, self.task, self.device = components.model, components.task, components.device
        self.optimizer, self.schedule, self.filter = components.optimizer, components.schedule, components.filter
        self.ema = _weight_average(self.model, self.config.ema)
        self.evaluated = self.model if self.ema is None else self.ema.module  # and exported
        self.canaries = Canaries(self.config.audit) if self.config.audit else None
        self._sensitivity = None if components.clip is None else components.clip.sensitivity  # at the start
        self.step, self.ranks, self.first = 0, ranks.share().world, ranks.is_first()
        self.commit = git_commit()
        # Kept in the checkpoint, to go on with.
        self.progress: dict[str, Any] = {
            "wall_seconds": 0.0,
            "metrics_rows": 0,
            "git_commit": self.commit,
            "diagnostics": False,
            "choices": {},
        }
        key = FingerprintKey.load()
        self._data_mac, self._key_id = key.mac(data.fingerprint), key.key_id
        self._records_mac = key.mac(data.records)
        initial = components.initial_weights()  # before a checkpoint replaces them
        self._facts = {
            "noise_version": NOISE_VERSION,
            "name": directory.name,
            "configuration": identity(self.config),
            "plan": components.plan.to_dict(),
            "fingerprint_key": self._key_id,
            "dataset": self._data_mac,
            # Steps after the last checkpoint are taken again under the same noise: so the same code takes them.
            **({"code": code_hash(component_strings(self.config))} if is_secret(self.config) else {}),
            **({} if self.task.spec.statistics is None else {"statistics": str(self.task.spec.statistics)}),
        }
        self._restore()
        self.progress["diagnostics"] |= self.config.diagnostics  # once recorded, the card must say so for good
        secret = RandomKey.from_seed(self.config.seed)
        if is_secret(self.config):
            secret = ranks.key_of_first(lambda: run_files.secret_key(directory))
        statistics = [] if self.task.spec.statistics is None else [str(self.task.spec.statistics)]
        names = (identity_hash(self.config), data.fingerprint, initial, *statistics)
        self.plan = replace(components.plan, key=secret.derive(*names))
        self._standardize()
        self.private = components.private_gradient(self.plan, self.step, self.canaries)
        self._begun = self._timed_from = self.step
        self._training_seconds = 0.0

    def train_step(self, batch: PoissonBatch) -> StepMetrics | None:
        """Take one step; return what measures it, if this step is logged."""
        began = time.perf_counter()
        if self.step == self._begun + 1:  # the first step of a process validates and measures, too
            self._timed_from, self._training_seconds = self.step, 0.0
        self.private.backward(batch)  # p.grad = (clipped sum + noise) / qN
        self.private.update_param_groups(self.optimizer)  # noise_std, clip_norm, clip_rate
        if self.filter is not None:
            self.filter.apply()
        logged = batch.step + 1 == self.plan.steps or (batch.step + 1) % self.config.eval_every == 0
        metrics = StepMetrics(self.optimizer) if logged and self.first else None
        self.optimizer.step()
        self.schedule.step()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        self.step += 1
        self._training_seconds += time.perf_counter() - began
        return metrics

    def evaluate(self) -> dict[str, float]:
        """Measure the model on the test set and, with diagnostics, on the hold-out."""
        found = evaluate(self.evaluated, self.task, self.data.test, self.config.precision, "test/")
        if self.config.diagnostics and self.data.held_out is not None:
            found |= evaluate(self.evaluated, self.task, self.data.held_out, self.config.precision, "private/holdout_")
        train = self.data.train
        if self.config.diagnostics and isinstance(train, TensorSource) and train.trimmed:  # texts cut, or just fitting
            found["private/full_length"] = float((train.inputs[:, -1] >= 0).double().mean())
        return found

    def save(self, metrics: Metrics | None) -> None:
        """Write a checkpoint, from which the same command continues, on any number of ranks."""
        check_weights(self.model)
        if metrics is None:
            return
        made = dict(self.components.engine.choices.made)
        self.progress.update(wall_seconds=self._wall_seconds(), metrics_rows=metrics.sync(), choices=made)
        path = self.directory / run_files.CHECKPOINT
        checkpoint.save(path, self.step, self._facts, self._stateful(), self.progress)

    def fit(self) -> Result | None:
        """Train to the end of the plan, or until a signal or the time limit; return the result, on rank 0."""
        metrics = self._begin() if self.first else None
        values: dict[str, float] = {}
        status = "finished"
        with stop_signals() as stop, Progress(self.plan, self.step, self.first) as live:
            try:
                if self.step == 0 and is_secret(self.config):
                    self.save(metrics)  # with the code that the first steps must find again
                views, micro_batch = self.config.views, self.components.micro_batch
                for batch in poisson_batches(self.data.train, self.plan, self.step, views, micro_batch):
                    measured = self.train_step(batch)
                    if metrics is not None and measured is not None:
                        values = self._log(metrics, measured)
                        live.evaluated(self.step, values)
                    live.step(self.step)
                    status = self._status(bool(stop))
                    if self.step < self.plan.steps:
                        if self.step % self.config.checkpoint_every == 0 or status != "finished":
                            self.save(metrics)
                        if status != "finished":
                            break
                status = "finished" if self.step == self.plan.steps else status
                self.save(metrics)
            except BaseException:
                if self.first and self._new and not self.plan.key.released[0]:  # nothing is out, so that all may change
                    (self.directory / run_files.CHECKPOINT).unlink(missing_ok=True)
                raise
            finally:
                if metrics is not None:
                    metrics.close()
        if not self.first:
            return None
        if "test/accuracy" not in values or status != "finished":
            values |= self.evaluate()
        return self._finish(status, values)

    def _restore(self) -> None:
        path = self.directory / run_files.CHECKPOINT
        self._new = not path.exists()
        if not self._new:
            self.step, self.progress = checkpoint.load(path, self._facts, self._stateful())
            # The same bits as without the interruption, on this machine or another of its kind.
            self.components.engine.choices.made.update(self.progress.get("choices", {}))
            if self.first and self.progress["git_commit"] != self.commit:
                warn(f"this run began at commit {self.progress['git_commit']}, the code is at {self.commit} now")

    def _standardize(self) -> None:
        """Release the channels' statistics into the model, unless a checkpoint has brought them."""
        if (statistics := self.task.spec.statistics) is None or self.step:
            return
        released = ranks.from_first(lambda: release_statistics(statistics, self.data.train, self.plan))
        for model in (self.model, self.evaluated):
            set_statistics(model, *released)

    def _stateful(self) -> dict[str, Any]:
        """Name the parts whose state a resumed run needs."""
        clip = self.components.clip
        parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        parts |= {"ema": self.ema} if self.ema else {}
        parts |= {"filter": self.filter} if self.filter else {}
        parts |= {"clip": clip} if isinstance(clip, Adaptive) else {}
        parts |= {"canaries": self.canaries} if self.canaries else {}
        return parts

    def _begin(self) -> Metrics:
        """Write what must be there before the first step."""
        self._write_card(None)
        self._record_spending(self.plan.steps, "planned")
        for name in (run_files.RESULT, run_files.WEIGHTS):  # of a run that was stopped
            (self.directory / name).unlink(missing_ok=True)
        text = yaml.safe_dump(asdict(self.config), sort_keys=False, allow_unicode=True)
        files.write_atomic(self.directory / run_files.CONFIG, text)
        path, rows = self.directory / run_files.METRICS, self.progress["metrics_rows"]
        metrics = Metrics(path, rows, make_tracker(self.config), self.directory.name, asdict(self.config))
        reset_peak_memory(self.device)
        self._began = time.perf_counter()
        self._clock = self._began - self.progress["wall_seconds"]
        return metrics

    def _log(self, metrics: Metrics, measured: StepMetrics) -> dict[str, float]:
        """Evaluate, and record everything that is known of this step."""
        wall = self._wall_seconds()
        values = self.evaluate()
        values |= {"privacy/epsilon": self.plan.epsilon_at(self.step), "optimizer/lr": measured.lr}
        values |= measured.measure() | self.private.statistics
        if isinstance(self.components.clip, Adaptive):
            values |= {f"privacy/{name}": self.private.step_info[name] for name in ("clip_norm", "clip_rate")}
        values |= {"memory/optimizer_state_bytes": optimizer_state_bytes(self.optimizer)}
        # Two digits: a time tells how many examples a step had, and is outside ε.
        values |= {"time/wall_seconds": _two_digits(wall), "time/examples_per_second": _two_digits(self._speed())}
        metrics.log(self.step, values, {"memory/peak_bytes": peak_memory_bytes(self.device)})
        return values

    def _status(self, stopped: bool) -> str:
        """Say why the loop should end, or `finished` while it need not. Ranks agree on it in the next step."""
        limit = self.config.time_limit if self.first else None
        late = limit is not None and time.perf_counter() - self._began > limit
        wish = "interrupted" if stopped else "time_limit" if late else "finished"
        if self.ranks == 1:
            return wish
        agreed, self.private.wants_to_stop = self.private.wants_to_stop, wish != "finished"
        return "finished" if not agreed else "interrupted" if wish == "finished" else wish

    def _finish(self, status: str, values: dict[str, float]) -> Result:
        """Write card, weights and result; erase the key of a finished run."""
        result = self._result(status, values)
        self._record_spending(self.step, status)
        checkpoint.export(self.directory / run_files.WEIGHTS, self.evaluated)  # also of a run that was stopped
        self._write_card(self.step, self._audit() if status == "finished" else None)  # with the hash of the weights
        files.write_json(self.directory / run_files.RESULT, result.to_json())
        if status == "finished":
            run_files.erase_key(self.directory)  # not before: without a result the run needs it to continue
        return result

    def _result(self, status: str, values: dict[str, float]) -> Result:
        plan, parameters = self.plan.to_dict(), list(self.model.parameters())
        metrics = {"test_accuracy": values["test/accuracy"], "test_loss": values["test/loss"]}
        metrics |= {HOLDOUT: values[HOLDOUT]} if HOLDOUT in values else {}
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        return Result(
            status=status,
            run=self.directory.name,
            metrics=metrics,
            guarantee=guarantee(self.about, self.plan, self.step),
            noise_version=NOISE_VERSION,
            data_mac=self._data_mac,
            records_mac=self._records_mac,
            fingerprint_key=self._key_id,
            epsilon=self.plan.epsilon_at(self.step),
            epsilon_rdp=self.plan.epsilon_at(self.step, "rdp"),
            accountant=plan.pop("accountant"),
            steps=self.step,
            planned_steps=plan.pop("steps"),
            plan=plan,
            parameters=sum(p.numel() for p in parameters),
            trainable_parameters=trainable,
            optimizer_state_bytes=optimizer_state_bytes(self.optimizer),
            adam_state_bytes=8 * trainable,
            peak_memory_bytes=peak_memory_bytes(self.device),
            examples_per_second=_two_digits(self._speed()),
            wall_seconds=_two_digits(self._wall_seconds()),
            seed=self.config.seed,
            git_commit=self.commit,
            versions=versions(),
            device=device_name(self.device),
            config=asdict(self.config),
            classes=class_names(self.data.classes, self.task.spec.classes),
            releases=[list(one) for one in self.plan.releases(self.step)],
        )

    def _record_spending(self, steps: int, status: str) -> None:
        """Add what this run spends to the user's ledger, if it makes a claim."""
        if self._counted():
            Ledger(home()).add(self._spending(steps, status))

    def _counted(self) -> bool:
        """Tell whether the ledger counts this run."""
        return self.config.ledger != "off" and is_secret(self.config) and self.plan.noise_multiplier > 0

    def _spending(self, steps: int, status: str) -> Spending:
        about = {"name": self.directory.name, "dataset": self.about.dataset}
        about |= {"data": self._records_mac, "key_id": self._key_id}
        run = self.plan.key.for_workers("ledger").material.hex()[:16]  # the same when the run is resumed
        return spending(self.plan, steps, status, run=run, **about)

    def _audit(self) -> AuditResult | None:
        """Audit a finished run that has canaries."""
        if self.canaries is None:
            return None
        result = self.canaries.audit(self.plan)
        write_audit(self.directory, result, self.canaries.scores.numpy(), self.canaries.included(self.plan).numpy())
        return result

    def _write_card(self, steps: int | None, audit: AuditResult | None = None) -> None:
        origin = code_rows(self.commit) | data_row(self._data_mac, self._key_id)
        origin |= weights_row("initial weights file", initial_file(self.components.model_arguments))
        if steps is not None:
            origin |= weights_row("weights", self.directory / run_files.WEIGHTS)
            if self.plan.noise_multiplier > 0:
                run = self._spending(steps, "finished")
                origin |= {"ledger of who trained": describe_total(home(), run, self._counted())}
        facts = CardFacts(self.task.spec.unit, self.components.public_facts(), origin)
        known = self.progress["diagnostics"]
        text = privacy_card(self.about, self.plan, self._sensitivity, steps, known, facts, audit)
        write_card(self.directory, text, self.directory.name)

    def _wall_seconds(self) -> float:
        """Seconds since the run began, those of earlier processes included."""
        return time.perf_counter() - self._clock

    def _speed(self) -> float:
        """Compute the expected examples per second of training steps."""
        examples = (self.step - self._timed_from) * self.plan.batch_size
        return examples / self._training_seconds if self._training_seconds else 0.0


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")


def _weight_average(model: nn.Module, decay: float | None) -> AveragedModel | None:
    return None if decay is None else AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
