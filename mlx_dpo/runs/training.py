"""A training run: settings in, a run folder out. The wiring; it knows all rooms."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import mlx.core as mx

from mlx_dpo.config import DPOConfig
from mlx_dpo.errors import ConfigError, TrainingError
from mlx_dpo.evaluation.heldout import evaluate
from mlx_dpo.objective.metrics import named, step_row
from mlx_dpo.policy import adapters
from mlx_dpo.policy.gated_delta import fused_gated_delta
from mlx_dpo.policy.limits import bounded_buffers
from mlx_dpo.preferences.batches import steps_per_epoch
from mlx_dpo.reporting.rows import MetricsLog, timed
from mlx_dpo.runs.fitting import settle
from mlx_dpo.runs.inputs import Inputs, read_inputs
from mlx_dpo.runs.method import (
    attach_adapters,
    choose_scorer,
    forward_only,
    make_objective,
    make_optimizer,
    make_plan,
    refuse_standstill,
)
from mlx_dpo.runs.paths import RunPaths, claimed, read_record, refuse_foreign_folder, write_record
from mlx_dpo.runs.record import check_contents, check_resumable, new_record
from mlx_dpo.runs.reference_cache import ask_reference
from mlx_dpo.training import checkpoint, loop
from mlx_dpo.training.stored import read_logps, write_logps
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
        self.evaluation: Row | None = None
        self._open = ExitStack()
        self._stop_requested = False

    def __enter__(self) -> Self:
        refuse_foreign_folder(self.paths)
        with ExitStack() as stack:
            stack.enter_context(claimed(self.paths))
            stack.enter_context(bounded_buffers())
            self._earlier = read_record(self.paths)
            if self._earlier is not None:
                check_resumable(self.paths, self._earlier, self.config, resume=self.resume)
            self._open = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    # --- before the first step -------------------------------------------------------------

    def load(self) -> None:
        """Load base and pairs; nothing is written yet."""
        self.inputs: Inputs = read_inputs(self.config)
        refuse_standstill(self.config, self.total_steps)
        self.record = new_record(self.config, self.inputs, total_steps=self.total_steps)
        if self._earlier is not None:
            check_contents(self.paths, self._earlier, self.record["provenance"])

    def attach(self) -> None:
        """Put fresh adapters on, choose how pairs are scored and passed, and begin the record.

        Afterwards `config` leaves nothing open.

        Raises:
            ConfigError: no pass that the settings allow fits into memory.
        """
        self.policy = self.inputs.base.model
        self._open.enter_context(fused_gated_delta(self.policy))
        self._adapter_config = attach_adapters(self.policy, self.config)
        self.choice = choose_scorer(self.inputs.base, self.config)
        self.fitted = settle(self.inputs, self.config, self.choice, self._earlier, self.force)
        self.record["settled"] = self.fitted.settled()
        if self.fitted.config.recompute and not self.config.recompute:
            self.choice = choose_scorer(self.inputs.base, self.fitted.config)
        self.config = self.fitted.config
        write_record(self.paths, self.record)  # only now is every setting known to be possible

    def score_reference(self, progress: Heard = lambda scored: None) -> None:
        """Ask the adapter-off base about every pair, or read what it said before."""
        with adapters.adapters_off(self.policy):
            self._reference = {split: self._scored(split, progress) for split in SPLITS}

    def _scored(self, split: str, progress: Heard) -> PairLogps:
        pairs = getattr(self.inputs, split)
        kept = read_logps(self.paths.reference(split), len(pairs))
        if kept is not None:
            progress(len(pairs))
            return kept
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
        """Begin where the last checkpoint is, if there is one."""
        self._optimizer = make_optimizer(self.policy, self.config)
        self.start = loop.Progress()
        if (last := checkpoint.latest(self.paths.checkpoints)) is not None:
            self.start = checkpoint.restore(last, self.policy, self._optimizer)

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
        self._stop_requested = True

    def train(self) -> Iterator[Row]:
        """A row of metrics per step, and one per evaluation with names that begin with `eval_`.

        Every row is in `metrics.jsonl` before it is yielded. After the last one the
        adapters lie in the run folder, unless the run was asked to stop: then `stopped`
        is True and the run can be resumed.
        """
        progress = self.start
        log = MetricsLog(self.paths.metrics, after=progress.step)
        plan = make_plan(
            self.config,
            self.inputs.train,
            self._reference["train"],
            choice=self.choice,
            total_steps=self.total_steps,
        )
        steps = loop.train(self.policy, self._optimizer, plan, start=progress)
        try:
            for seconds, (reached, metrics) in timed(steps):
                tokens, progress = reached.num_tokens - progress.num_tokens, reached
                speed = {
                    "tokens_per_second": tokens / seconds,
                    "peak_memory_gb": mx.get_peak_memory() / 1e9,
                }
                yield log.write(step_row(metrics) | speed)
                if self._due(self.config.eval_steps, progress.step) and self.inputs.valid:
                    yield log.write({"step": progress.step, **self.evaluate()})
                if self._due(self.config.save_steps, progress.step) or self._stop_requested:
                    self._save(progress)
                if self._stop_requested and progress.step < self.total_steps:
                    self.stopped = True
                    return
        except TrainingError:
            self._save(progress)
            raise
        yield from self._finish(log, progress)

    def evaluate(self) -> Row:
        """Metrics on the held-out pairs under `eval_` names, as the policy is now."""
        metrics = evaluate(
            self.policy,
            self.inputs.valid,
            self._reference["valid"],
            make_objective(self.config),
            score=forward_only(self.config, self.choice),
        )
        return named(metrics, prefix="eval_")

    def _due(self, every: int | None, step: int) -> bool:
        return every is not None and step % every == 0 and step < self.total_steps

    def _save(self, progress: loop.Progress) -> None:
        checkpoint.save(
            self.paths.checkpoints, self.policy, self._optimizer, progress, self._adapter_config
        )
        checkpoint.prune(self.paths.checkpoints, self.config.save_total_limit)

    def _finish(self, log: MetricsLog, progress: loop.Progress) -> Iterator[Row]:
        self._save(progress)
        if self.inputs.valid:
            # A crash may have come between the last evaluation and the end of the run.
            done = log.evaluation_at(progress.step)
            self.evaluation = done or log.write({"step": progress.step, **self.evaluate()})
            yield self.evaluation
        adapters.save_adapter(self.paths.folder, self.policy, self._adapter_config)
        self.record |= {"state": "finished", "evaluation": self.evaluation}
        write_record(self.paths, self.record)
