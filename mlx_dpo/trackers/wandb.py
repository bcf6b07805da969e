"""Weights & Biases as a tracker. It receives only metrics and settings."""

from pathlib import Path
from typing import ClassVar

from mlx_dpo.trackers.base import (
    COMMON_ERRORS,
    DEFAULT_PROJECT,
    RunInfo,
    remove_other_folders,
    with_transformers_names,
)
from mlx_dpo.types import MetricsRow

STEP_METRIC = "train/global_step"  # transformers' name of the step
UPLOAD_TIMEOUT = 60.0  # seconds that `close` waits for the upload of the rest


class WandB:
    """A W&B run: uploaded, or stored locally for `wandb sync`, depending on `WANDB_MODE`."""

    name: ClassVar[str] = "wandb"
    library: ClassVar[str] = "wandb"
    has_run_names: ClassVar[bool] = True

    def __init__(self, run: RunInfo) -> None:
        import wandb

        self._run = wandb.init(
            project=run.project or wandb.setup().settings.project or DEFAULT_PROJECT,
            name=run.name,
            id=run.id,
            resume="allow",
            dir=run.folder,
            config=dict(run.settings),
            settings=wandb.Settings(
                silent=True,
                reinit="create_new",  # a notebook may have a run of its own
                finish_timeout=UPLOAD_TIMEOUT,
                finish_timeout_raises=True,
                # No capture of the screen, code, paths, packages or machine.
                console="off",
                host="-",
                save_code=False,
                disable_code=True,
                disable_git=True,
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
        self._run.define_metric(STEP_METRIC)
        self._run.define_metric("*", step_metric=STEP_METRIC)
        if self._run.disabled:
            self.location = "disabled by WANDB_MODE"
        elif self._run.offline:
            folder = Path(self._run.dir).parent
            remove_other_folders(folder, folder.parent.glob(f"offline-run-*-{run.id}"))
            self.location = f"wandb sync {folder}"
        else:
            self.location = str(self._run.url)

    def log(self, row: MetricsRow) -> None:
        """Log a metrics row, unless the server already has the row."""
        # W&B's own step must increase with every row: an evaluation comes after the training row
        # of the same step, so each optimizer step takes two of them.
        wandb_step = 2 * int(row["step"]) + ("eval_loss" in row)
        if wandb_step >= self._run.starting_step:
            metrics = with_transformers_names(row) | {STEP_METRIC: int(row["step"])}
            self._run.log(metrics, step=wandb_step, commit=True)

    def close(self, *, completed: bool) -> None:
        """Finish the W&B run as completed or as failed, and wait until all rows are uploaded."""
        self._run.finish(exit_code=0 if completed else 1)

    @classmethod
    def unavailable(cls) -> str | None:
        """Return a hint to log in if runs are uploaded without a valid login, else None."""
        import wandb

        if wandb.setup().settings.mode not in ("online", "run", "shared"):
            return None
        if wandb.login(prompt=False, verify=True):
            return None
        return "not logged in; run `wandb login`, or set WANDB_MODE=offline to log locally"

    @staticmethod
    def library_errors() -> tuple[type[Exception], ...]:
        """Return the exception classes common to all trackers, and that of W&B."""
        import wandb

        return (*COMMON_ERRORS, wandb.Error)
