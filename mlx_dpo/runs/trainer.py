"""A training run: settings in, a run folder out. The wiring; it knows all rooms."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import mlx.core as mx

from mlx_dpo.adapters.files import save_adapter
from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.data.batching import steps_per_epoch
from mlx_dpo.data.tokenization.cache import CountingRows
from mlx_dpo.errors import ConfigError, TrainingError
from mlx_dpo.losses.metrics import named, step_row
from mlx_dpo.profiling.memory import limited_buffers
from mlx_dpo.reporting.metrics_log import MetricsLog, read_rows, timed
from mlx_dpo.reporting.trackers.base import Sinks
from mlx_dpo.runs.auto_batch_size import settle
from mlx_dpo.runs.build import (
    as_reference,
    attach_adapters,
    choose_scorer,
    forward_only,
    make_moving,
    make_objective,
    make_optimizer,
    make_plan,
    refuse_standstill,
    weigher,
)
from mlx_dpo.runs.early_stopping import Best
from mlx_dpo.runs.folder import (
    RunPaths,
    check_contents,
    check_resumable,
    claimed,
    new_record,
    read_record,
    refuse_foreign_folder,
    start_provenance,
    write_record,
)
from mlx_dpo.runs.inputs import Inputs, read_inputs, unheard
from mlx_dpo.runs.reference import Counting, ask_other, ask_reference, uncounted
from mlx_dpo.runs.save_peft import ship
from mlx_dpo.runs.trackers import check_sinks, make_monitor, open_sinks
from mlx_dpo.scoring.kernels.gated_delta import use_fused_gated_delta
from mlx_dpo.training import checkpoint, loop
from mlx_dpo.training.logps_cache import read_logps, write_logps
from mlx_dpo.training.objective import evaluate
from mlx_dpo.types import PairLogps

Row = dict[str, float]
Heard = Callable[[int], None]
SPLITS = ("train", "valid")


class Run:
    """A run that a program or a notebook can drive.

        with Run(DPOConfig(model=..., pairs=..., output=...)) as run:
            run.prepare()
            for row in run.train():
                print(row)

    Entering claims the folder; `prepare` loads, scores the reference and attaches the
    adapters; `train` yields a row per step and per evaluation; leaving releases the folder.
    With `force` a run begins although it is not going to fit into memory.
    """

    def __init__(self, config: DPOConfig, *, resume: bool = False, force: bool = False) -> None:
        for name in ("model", "pairs", "output"):
            if not getattr(config, name):
                raise ConfigError(f"`{name}` is not set")
        self.config = config
        self.resume = resume
        self.force = force
        self.paths = RunPaths(Path(config.output))
        self.stopped = False
        self.stopped_early_at: int | None = None
        self.evaluation: Row | None = None  # of the adapters that the run finishes with
        self.warnings: list[str] = []  # what the monitor said, before a resume as well
        self.shipped = ""  # where the adapters of a finished run load
        self.best = Best(config, self.paths)
        self.sinks = Sinks()  # other programs that are told the rows
        self._open = ExitStack()
        self.stop_requested = False

    def __enter__(self) -> Self:
        check_sinks(self.config)
        refuse_foreign_folder(self.paths)
        with ExitStack() as stack:
            stack.enter_context(claimed(self.paths))
            stack.enter_context(limited_buffers())
            stack.push(lambda kind, error, trace: self.sinks.close(whole=kind is None))
            self.earlier = read_record(self.paths)
            if self.earlier is not None:
                check_resumable(self.paths, self.earlier, self.config, resume=self.resume)
            self._open = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, trace)

    # --- before the first step -------------------------------------------------------------

    def load(self, counting: Counting = uncounted, rows: CountingRows = unheard) -> None:
        """Load base and pairs; nothing is written yet.

        Another model as the reference is asked before, and counts its pairs; many `rows` are
        counted as they become tokens.
        """
        mx.reset_peak_memory()  # of what the same program did before
        start = start_provenance(self.config)
        if self.config.reference_model is not None:
            self._answers, digest = ask_other(self.config, counting, rows)
            start |= {"reference": digest}
        self.inputs: Inputs = read_inputs(self.config, counting=rows)
        refuse_standstill(self.config, self.total_steps)
        self.best.refuse_idle(
            every=self.config.eval_steps,
            total_steps=self.total_steps,
            held_out=len(self.inputs.valid),
        )
        self.record = new_record(
            self.config, self.inputs, start, self.earlier, total_steps=self.total_steps
        )
        if self.earlier is not None:
            check_contents(self.paths, self.earlier, self.record["provenance"])

    def attach(self) -> None:
        """Make the base a policy, choose how pairs are scored and passed, and begin the record.

        Afterwards `config` leaves nothing open.

        Raises:
            ConfigError: no pass that the settings allow fits into memory.
        """
        self.policy = self.inputs.base.model
        self._open.enter_context(use_fused_gated_delta(self.policy))
        self.adapter_config = attach_adapters(self.inputs.base, self.config)
        self.choice = choose_scorer(self.inputs.base, self.config)
        self.fitted = settle(self.inputs, self.config, self.choice, self.earlier, self.force)
        self.record["settled"] = self.fitted.settled()
        if self.fitted.config.recompute and not self.config.recompute:
            self.choice = choose_scorer(self.inputs.base, self.fitted.config)
        self.config = self.fitted.config
        write_record(self.paths, self.record)  # only now is every setting known to be possible

    def score_reference(self, progress: Heard = lambda scored: None) -> None:
        """Ask the policy as it starts about every pair, or read what it said before.

        An objective that needs no reference is given zeros.
        """
        with as_reference(self.policy, self.config):
            self.reference = {split: self._scored(split, progress) for split in SPLITS}

    def _scored(self, split: str, progress: Heard) -> PairLogps:
        pairs = getattr(self.inputs, split)
        if not make_objective(self.config).needs_reference:
            return PairLogps(mx.zeros((len(pairs),)), mx.zeros((len(pairs),)))
        kept = read_logps(self.paths.reference(split), len(pairs))
        if kept is not None:
            progress(len(pairs))
            return kept
        if self.config.reference_model is not None:
            logps = self._answers[split]
        else:
            logps = ask_reference(
                self.policy,
                pairs,
                self.record,
                held=self.record["provenance"]["held"],
                score=forward_only(self.config, self.choice),
                progress=progress,
            )
        write_logps(self.paths.reference(split), logps)
        return logps

    def restore(self) -> None:
        """Begin where the last checkpoint is, if there is one, and tell other programs so.

        Raises:
            ConfigError: one of them cannot be told.
        """
        self.optimizer = make_optimizer(self.policy, self.config)
        self.start = loop.Progress()
        self.moving = make_moving(self.policy, self.config, self.choice)
        if (last := checkpoint.latest(self.paths.checkpoints)) is not None:
            self.start = checkpoint.restore(last, self.policy, self.optimizer, self.moving)
        rows = [row for row in read_rows(self.paths.metrics) if row["step"] <= self.start.step]
        self.best.go_on(rows)
        self.monitor = make_monitor(self.config, self.inputs.train, total_steps=self.total_steps)
        self.warnings = [sentence for row in rows for sentence in self.monitor.hear(row)]
        self.record["warnings"] = self.warnings
        write_record(self.paths, self.record)
        open_sinks(self, rows)

    def prepare(self, progress: Heard = lambda scored: None) -> None:
        """All of it; afterwards `train` can begin."""
        self.load()
        self.attach()
        self.score_reference(progress)
        self.restore()

    # --- the steps -------------------------------------------------------------------------

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        an_epoch = steps_per_epoch(len(self.inputs.train), self.config.batch_size)
        return self.config.max_steps or an_epoch * (self.config.epochs or 1)

    def request_stop(self) -> None:
        """Save after the step that is under way, and stop."""
        self.stop_requested = True

    def train(self) -> Iterator[Row]:
        """A row of metrics per step, and one per evaluation with names that begin with `eval_`.

        Every row is in `metrics.jsonl` before it is yielded. After the last one the
        adapters lie in the run folder, unless the run was asked to stop: then `stopped`
        is True and the run can be resumed. What the monitor finds is in `warnings`.
        """
        yield from Steps(self).rows()

    def evaluate(self) -> Row:
        """Metrics on the held-out pairs under `eval_` names, as the policy is now."""
        moved = self.moving and self.moving.logps(self.policy, self.inputs.valid)
        metrics = evaluate(
            self.policy,
            self.inputs.valid,
            moved or self.reference["valid"],
            make_objective(self.config),
            score=forward_only(self.config, self.choice),
            on_policy=weigher(self.config, self.choice),
        )
        return named(metrics, prefix="eval_")


class Steps:
    """The rest of a run, from the step at which it goes on."""

    def __init__(self, run: "Run") -> None:
        """Drop the rows that are going to be written again."""
        self.run = run
        self.progress = run.start
        self.log = MetricsLog(run.paths.metrics, after=run.start.step)

    def rows(self) -> Iterator[Row]:
        """A row per step and per evaluation, each in `metrics.jsonl` before it is yielded."""
        run = self.run
        try:
            for row in self._trained():
                yield row
                if self._due(run.config.eval_steps) and run.inputs.valid:
                    yield self._judged()
                    if run.best.is_over:
                        break
                if self._due(run.config.save_steps) or run.stop_requested:
                    self._save()
                if run.stop_requested and self.progress.step < run.total_steps:
                    run.stopped = True
                    return
        except TrainingError:
            self._save()
            raise
        yield from self._finish()

    def _trained(self) -> Iterator[Row]:
        """Take the steps, unless the run is over: it was killed after it had stopped early."""
        run = self.run
        if run.best.is_over:
            return
        plan = make_plan(
            run.config,
            run.inputs.train,
            run.reference["train"],
            choice=run.choice,
            total_steps=run.total_steps,
            moving=run.moving,
        )
        steps = loop.train(run.policy, run.optimizer, plan, start=self.progress)
        for seconds, (reached, metrics) in timed(steps):
            tokens, self.progress = reached.num_tokens - self.progress.num_tokens, reached
            speed = {
                "tokens_per_second": tokens / seconds,
                "peak_memory_gb": mx.get_peak_memory() / 1e9,
            }
            row = self._written(step_row(metrics) | speed)
            if said := run.monitor.hear(row):
                run.warnings += said
                write_record(run.paths, run.record)
            yield row

    def _written(self, row: Row) -> Row:
        """Keep a row, then tell it: what is not kept is going to be told again."""
        self.run.sinks.write(self.log.write(row))
        return row

    def _due(self, every: int | None) -> bool:
        step = self.progress.step
        return every is not None and step % every == 0 and step < self.run.total_steps

    def _judged(self) -> Row:
        """Evaluate; the adapters of a best one are on the disk before its row is."""
        run, step = self.run, self.progress.step
        row = {"step": step, **run.evaluate()}
        run.best.judge(row, lambda folder: save_adapter(folder, run.policy, run.adapter_config))
        return self._written(row)

    def _save(self) -> None:
        run = self.run
        checkpoint.save(
            run.paths.checkpoints,
            run.policy,
            run.optimizer,
            self.progress,
            run.adapter_config,
            run.moving,
        )
        checkpoint.prune(run.paths.checkpoints, run.config.save_total_limit)
        run.best.prune(read_rows(run.paths.metrics))

    def _finish(self) -> Iterator[Row]:
        run, step = self.run, self.progress.step
        self._save()
        if step < run.total_steps:
            run.stopped_early_at = step
        if run.inputs.valid:
            # A crash may have come between the last evaluation and the end of the run.
            last = self.log.evaluation_at(step) or self._judged()
            if run.stopped_early_at is None or run.start == self.progress:
                yield last
            run.evaluation = self.log.evaluation_at(run.best.kept or step)
        run.best.put_into(run.policy)
        save_adapter(run.paths.folder, run.policy, run.adapter_config)
        run.shipped = ship(run.paths.folder, run.inputs.base, run.config)
        run.record |= {
            "state": "finished",
            "evaluation": run.evaluation,
            "kept": run.best.told(),
            "stopped_early_at": run.stopped_early_at,
            "adapter": run.shipped,
        }
        write_record(run.paths, run.record)
        run.best.clear()
