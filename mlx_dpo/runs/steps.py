"""The steps of a prepared run: rows out, and onto the disk what they lead to."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_dpo.errors import TrainingError
from mlx_dpo.objective.metrics import step_row
from mlx_dpo.policy.adapter_files import save_adapter
from mlx_dpo.reporting.rows import MetricsLog, read_rows, timed
from mlx_dpo.runs.method import make_plan
from mlx_dpo.runs.paths import write_record
from mlx_dpo.runs.shipping import ship
from mlx_dpo.training import checkpoint, loop

if TYPE_CHECKING:
    from mlx_dpo.runs.training import Run

Row = dict[str, float]


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
