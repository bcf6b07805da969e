"""The DPO trainer: trains a policy as a `DPOConfig` says and writes a run folder."""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import fields
from inspect import signature
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.config.other_trainers import check_trainer_arguments
from mlx_dpo.distributed import heartbeats
from mlx_dpo.distributed.connect import connect
from mlx_dpo.errors import ConfigError, TrainingError
from mlx_dpo.losses.metrics import EVAL_PREFIX, step_row, to_public_names
from mlx_dpo.parallel.second_process import peak_memory, reset_peak_memory
from mlx_dpo.profiling.device_memory import limited_buffers
from mlx_dpo.reporting.metrics_log import MetricsLog, timed, undamaged_rows
from mlx_dpo.runs.auto_batch_size import choose_passes
from mlx_dpo.runs.build import (
    attach_adapters,
    check_step_settings,
    make_answer_sampler,
    make_dataset_scorer,
    make_on_policy_weights,
    make_optimizer,
    make_order,
    make_plan,
    make_synced_reference,
    reference_mode,
    with_grouping,
    with_learning_rate,
)
from mlx_dpo.runs.distributed.follower_folder import find_checkpoint, open_run_folder
from mlx_dpo.runs.distributed.handshake import (
    add_ranks,
    check_inputs,
    check_run_settings,
    compare_machines,
    share_day,
)
from mlx_dpo.runs.distributed.peers import with_errors_of_all_ranks
from mlx_dpo.runs.distributed.saving import save_best_adapters, save_checkpoint, save_final_adapters
from mlx_dpo.runs.distributed.shard_base import base_loader
from mlx_dpo.runs.early_stopping import BestCheckpoint
from mlx_dpo.runs.folder import (
    RunPaths,
    check_provenance,
    new_record,
    remove_run,
    start_adapter_provenance,
    write_record,
)
from mlx_dpo.runs.inputs import Datasets, Inputs, load_inputs, with_max_length
from mlx_dpo.runs.reference import (
    ProgressCallback,
    compute_reference_model_logps,
    count_steps,
    evaluate_before,
    needed_pairs,
    reference_logps_of_split,
    reference_phase,
)
from mlx_dpo.runs.trackers import make_monitor, open_trackers
from mlx_dpo.scoring.kernels.gated_delta import use_fused_gated_delta
from mlx_dpo.trackers.base import OpenTrackers
from mlx_dpo.training import checkpoint, loop
from mlx_dpo.training.monitor.recorded_samples import RecordedSampler
from mlx_dpo.training.monitor.verdict import Verdict
from mlx_dpo.training.objective import Objective, evaluate
from mlx_dpo.types import MetricsRow

SPLITS = ("train", "valid")


class DPOTrainer:
    """A training run: trains the adapters of a policy by DPO and writes a run folder.

        DPOTrainer(DPOConfig(model=..., pairs=..., output=...)).train()

    trains to the end. To act between steps, iterate over `steps`:

        with DPOTrainer(config) as trainer:
            for row in trainer.steps():
                print(row)

    Entering the context locks the run folder and leaving releases it.

    Args:
        config: Settings; `model`, `output` and `pairs` or `train_dataset` are required.
        train_dataset: Pairs in memory: a list of dictionaries or a `datasets.Dataset`.
        eval_dataset: Held-out pairs in memory.
        resume: Continue the unfinished run in `output`.
        overwrite: Replace the run in `output`.
        force: Start even if the estimated memory does not fit.
    """

    def __init__(
        self,
        config: DPOConfig | None = None,
        *,
        train_dataset: Iterable[Mapping[str, Any]] | None = None,
        eval_dataset: Iterable[Mapping[str, Any]] | None = None,
        resume: bool = False,
        overwrite: bool = False,
        force: bool = False,
        **unknown: object,
    ) -> None:
        check_trainer_arguments(
            unknown,
            known=signature(DPOTrainer).parameters,
            settings=[field.name for field in fields(DPOConfig)],
        )
        if not isinstance(config, DPOConfig):
            raise ConfigError(f"the first argument must be a DPOConfig, got {config!r}")
        self.datasets = Datasets.in_memory(config, train_dataset, eval_dataset)
        self.config = config
        if resume and overwrite:
            raise ConfigError("`overwrite` has no effect together with `resume`")
        self.resume = resume
        self.overwrite = overwrite
        self.force = force
        self.paths = RunPaths(Path(config.output))  # of a temporary folder except on rank 0
        self.ranks = connect()
        self.stopped = False  # on request, before the last step
        self.stopped_early_at: int | None = None
        self.evaluation: MetricsRow | None = None  # of the adapters that the run ends with
        self.warnings: list[str] = []  # from the monitor, including those before a resume
        self.verdict: Verdict | None = None  # on the trained policy
        self.adapter_support = ""  # programs that can load the adapters of the finished run
        self.best = BestCheckpoint(config, self.paths)
        self.trackers = OpenTrackers()
        self.answer_sampler: RecordedSampler | None = None
        self.stop_requested = False
        self._is_prepared = False
        self._is_entered = False
        self._resources = ExitStack()

    def __enter__(self) -> Self:
        self.peers = compare_machines(self.ranks)
        check_run_settings(self.peers, self)
        with ExitStack() as stack:
            opened = stack.enter_context(open_run_folder(self))
            self.paths, self.best.paths, self.earlier = opened.paths, opened.paths, opened.record
            stack.enter_context(limited_buffers())
            stack.push(lambda kind, error, trace: self.trackers.close(completed=kind is None))
            if self.earlier is not None:
                self.config = self.config.with_recorded_choices(self.earlier["settings"])
            self._resources = stack.pop_all()
        self._is_entered = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_entered = False
        self._resources.__exit__(kind, error, trace)

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps of the whole run."""
        return count_steps(self.config, self.order)

    # --- prepare ---------------------------------------------------------------------------

    def prepare(self, progress: ProgressCallback = lambda scored: None) -> None:
        """Load the inputs, attach adapters, compute reference log-probs and restore a checkpoint.

        `progress` is called with the number of pairs whose reference log-probs are ready.
        """
        if not self._is_entered:
            raise RuntimeError(
                "use the trainer in a `with` block: `with DPOTrainer(config) as ...`"
            )
        self.load()
        self.attach()
        self.compute_reference_logps(progress)
        self.restore()

    @with_errors_of_all_ranks
    def load(self) -> None:
        """Load the base model and the pairs; the run folder is not written.

        The log-probs of a separate reference model are computed first; then it is freed.
        """
        reset_peak_memory()  # earlier work of the same process does not count
        day, start = share_day(self.ranks, self.earlier), start_adapter_provenance(self.config)
        if self.config.reference_model is not None:
            self.reference_model_logps, digest = compute_reference_model_logps(self, day)
            start |= {"reference_model": digest}
        load = base_loader(self.config, self.peers, self.earlier)
        self.inputs: Inputs = load_inputs(self.config, read=load, datasets=self.datasets, day=day)
        self.config = with_max_length(self.config, self.inputs.base)
        reason = ""
        if self.earlier is None:  # a resumed run keeps the order that it began with
            self.config, reason = with_grouping(self.config, self.inputs.train)
        self.order = make_order(self.config, self.inputs.train)
        check_step_settings(self.config, self.total_steps)
        self.best.check_has_effect(
            every=self.config.eval_steps,
            total_steps=self.total_steps,
            held_out=len(self.inputs.valid),
        )
        self.record = new_record(
            self.config, self.inputs, start, self.earlier, total_steps=self.total_steps
        )
        self.record["datasets_in_memory"] = self.datasets.splits
        if reason:
            self.record["chosen_settings"]["group_by_prompt"] = reason
        check_inputs(self.peers, self.record["provenance"])
        if self.earlier is not None:
            check_provenance(self.paths, self.earlier, self.record["provenance"])

    @with_errors_of_all_ranks
    def attach(self) -> None:
        """Attach the adapters, choose scorer and micro-batch size, and write `run.json`.

        Afterwards `config` contains the chosen micro-batch size.

        Raises:
            ConfigError: no micro-batch size that the settings allow fits into memory.
        """
        self.policy = self.inputs.base.model
        self._resources.enter_context(use_fused_gated_delta(self.policy))
        self.adapter_config = attach_adapters(self.inputs.base, self.config)
        self.config, reason = with_learning_rate(self.inputs, self.config, self.total_steps)
        if reason:
            self.record["settings"]["learning_rate"] = self.config.learning_rate
            self.record["chosen_settings"]["learning_rate"] = reason
        self.choice, self.fitted = choose_passes(
            self.inputs, self.config, self.earlier, force=self.force, peers=self.peers
        )
        self.config = self.fitted.config
        self.record["automatic_settings"] = self.fitted.automatic_settings()
        if self.config.scorer == "auto":
            self.record["automatic_settings"]["scorer"] = self.choice.name
        self.record["passes_at_once"] = self.fitted.passes_at_once
        if self.overwrite:
            remove_run(self.paths)
        write_record(self.paths, self.record)  # only now are all settings known to be possible

    @with_errors_of_all_ranks
    def compute_reference_logps(self, progress: ProgressCallback = lambda scored: None) -> None:
        """Compute the log-probs of the pairs under the reference, or read them from disk.

        Reference-free losses get zeros, and training pairs that no step sees get NaN. `progress` is
        called with the number of pairs done.
        """
        needed = needed_pairs(self.config, self.inputs.splits)
        mode = reference_mode(self.policy, self.config)
        with reference_phase(self.config, needed) as advance, mode:

            def count(pairs: int) -> None:
                advance(pairs)
                progress(pairs)

            self.reference = {
                split: reference_logps_of_split(self, split, needed[split], count)
                for split in SPLITS
            }

    @with_errors_of_all_ranks
    def restore(self) -> None:
        """Restore the last whole checkpoint, if there is one, and open the experiment trackers.

        Raises:
            ConfigError: a tracker cannot be opened.
        """
        self.record["before"] = (self.earlier or {}).get("before") or evaluate_before(self)
        self.optimizer = make_optimizer(self.policy, self.config)
        self.start = loop.Progress()
        self.synced_reference = make_synced_reference(self.policy, self.config, self.choice)
        last = find_checkpoint(self.ranks, self.paths, self.best)
        if last is not None:
            self.start = checkpoint.restore(
                last, self.policy, self.optimizer, self.synced_reference
            )
        rows = [r for r in undamaged_rows(self.paths.metrics)[0] if r["step"] <= self.start.step]
        self.best.restore(rows)
        self.monitor = make_monitor(self.config, self.inputs.train, total_steps=self.total_steps)
        step, earlier = self.start.step, self.earlier
        if self.ranks.is_main or self.ranks.in_lockstep:
            self.answer_sampler = make_answer_sampler(self.config, self.inputs, self.paths, step)
        self.warnings = [warning for row in rows for warning in self.monitor.update(row)]
        self.record["warnings"] = self.warnings
        add_ranks(self.record, self.peers, earlier, step)
        write_record(self.paths, self.record)
        if self.ranks.is_main:
            open_trackers(self.trackers, self.config, self.record, rows, step=step, earlier=earlier)
        self._is_prepared = True

    # --- train -----------------------------------------------------------------------------

    def request_stop(self) -> None:
        """Request that the run saves a checkpoint after the current step and stops."""
        self.stop_requested = True

    def train(self) -> list[MetricsRow]:
        """Train to the end and return all rows of metrics.

        If necessary, the run folder is locked and the run is prepared first.
        """
        with nullcontext() if self._is_entered else self:
            return list(self.steps())

    def steps(self) -> Iterator[MetricsRow]:
        """Yield one row of metrics per step, and one with `eval_` names per evaluation.

        The run is prepared first if necessary. Each row is in `metrics.jsonl` before it is
        yielded. After the last row the adapters are in the run folder, unless a stop was
        requested: then `stopped` is True and the run can be resumed. See also `warnings`. No row
        follows after the trainer's context is left.
        """
        steps = self._steps()
        self._resources.callback(steps.close)  # ends a second process, which has the lock file open
        return steps

    def _steps(self) -> Generator[MetricsRow, None, None]:
        if not self._is_prepared:
            self.prepare()
        self._progress = self.start
        self._log = MetricsLog(self.paths.metrics, after=self.start.step)
        try:
            for row in self._take_steps():
                yield row
                if self._is_due(self.config.eval_steps) and self.inputs.valid:
                    yield self._evaluate_and_log()
                    if self.best.should_stop:
                        break
                stops = self.ranks.any("stop", self.stop_requested)
                if self._is_due(self.config.save_steps) or stops:
                    self._save_checkpoint()
                if stops and self._progress.step < self.total_steps:
                    self.stopped = True
                    return
        except TrainingError as error:  # on all ranks, as it was found in gathered values
            self._save_checkpoint()
            raise self.peers.shared(error) from error.__cause__
        yield from self._finish()

    def _take_steps(self) -> Iterator[MetricsRow]:
        """Take the remaining optimizer steps; yield the logged metrics row of each.

        No step remains if the run was killed after early stopping had ended it.
        """
        if self.best.should_stop:
            return
        plan = make_plan(
            self.config,
            self.inputs.train,
            self.reference["train"],
            choice=self.choice,
            total_steps=self.total_steps,
            synced_reference=self.synced_reference,
        )
        steps = loop.train(self.policy, self.optimizer, plan, start=self._progress)
        for seconds, (progress, metrics) in timed(steps):
            tokens = progress.num_tokens - self._progress.num_tokens
            self._progress = progress
            heartbeats.note(step=progress.step)
            speed = {
                "tokens_per_second": tokens / seconds,
                "peak_memory_gb": peak_memory() / 1e9,
            }
            row = self._log_row(step_row(metrics) | speed)
            self._warn(self.monitor.update(row))
            yield row

    def _log_row(self, row: MetricsRow) -> MetricsRow:
        """Write a metrics row to `metrics.jsonl` and then to the trackers; return the row.

        A row that a crash kept out of the file is computed and logged again after resuming.
        """
        self.trackers.log(self._log.write(row))
        return row

    def _is_due(self, every: int | None) -> bool:
        step = self._progress.step
        return every is not None and step % every == 0 and step < self.total_steps

    def _evaluate_and_log(self) -> MetricsRow:
        """Evaluate the policy, save its adapters if best so far, and return the metrics row."""
        step = self._progress.step
        samples = self.answer_sampler.measure(self.policy, step) if self.answer_sampler else {}
        samples = self.ranks.broadcast_json("samples", samples)
        row = {"step": step, **self.evaluate(), **samples}
        save_best_adapters(self, row)
        self._warn(self.monitor.update(row))
        return self._log_row(row)

    def _warn(self, warnings: Sequence[str]) -> None:
        if warnings:
            self.warnings += warnings
            write_record(self.paths, self.record)

    def evaluate(self) -> MetricsRow:
        """Return the current policy's metrics on the held-out pairs, with the prefix `eval_`."""
        synced = self.synced_reference and self.synced_reference.logps(
            self.policy, self.inputs.valid
        )
        metrics = evaluate(
            self.policy,
            self.inputs.valid,
            synced or self.reference["valid"],
            Objective(self.config),
            score=make_dataset_scorer(self.config, self.choice),
            on_policy=make_on_policy_weights(self.config, self.choice),
        )
        return to_public_names(metrics, prefix=EVAL_PREFIX)

    def _save_checkpoint(self) -> None:
        save_checkpoint(self, self._progress, self._log)

    # --- finish ----------------------------------------------------------------------------

    def _finish(self) -> Iterator[MetricsRow]:
        """Write the final adapters and results; yield the last evaluation unless done before."""
        step = self._progress.step
        self._save_checkpoint()
        if step < self.total_steps:
            self.stopped_early_at = step
        if self.inputs.valid:
            # A crash may have come between the last evaluation and the end of the run.
            last = self._log.evaluation_at(step) or self._evaluate_and_log()
            if self.stopped_early_at is None or self.start == self._progress:
                yield last
            self.evaluation = self._log.evaluation_at(self.best.step or step)
        digest, self.adapter_support = save_final_adapters(self)
        self.verdict = self.monitor.judge(self.evaluation)
        self.record |= {
            "state": "finished",
            "evaluation": self.evaluation,
            "verdict": self.verdict and self.verdict.to_dict(),
            "best_checkpoint": self.best.to_dict(),
            "stopped_early_at": self.stopped_early_at,
            "adapter": self.adapter_support,
            "adapter_sha256": digest,
            "num_metrics_rows": self._log.flush(),
        }
        write_record(self.paths, self.record)
        self.best.remove()
