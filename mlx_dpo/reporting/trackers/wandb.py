"""Weights & Biases, told rows and settings and no more."""

from pathlib import Path

from mlx_dpo.config.training import PROJECT
from mlx_dpo.reporting.trackers.base import FAILURES, Announced, Row, named_there, remove_others

STEP = "train/global_step"  # transformers' name of the step
UPLOAD = 60.0  # seconds that the end of a run waits for what is not uploaded yet


class WandB:
    """A run of Weights & Biases, online or, as `WANDB_MODE` says, kept here to be synced."""

    name = "wandb"
    library = "wandb"

    def __init__(self, told: Announced) -> None:
        import wandb

        self._run = wandb.init(
            project=told.project or wandb.setup().settings.project or PROJECT,
            name=told.name,
            id=told.id,
            resume="allow",
            dir=told.folder,
            config=dict(told.settings),
            settings=wandb.Settings(
                silent=True,
                reinit="create_new",  # a notebook may have a run of its own
                finish_timeout=UPLOAD,
                finish_timeout_raises=True,
                # Nothing but metrics and settings: no screen, code, paths, packages or machine.
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
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)
        if self._run.disabled:
            self.where = "off, as WANDB_MODE says"
        elif self._run.offline:
            here = Path(self._run.dir).parent
            remove_others(here, here.parent.glob(f"offline-run-*-{told.id}"))
            self.where = f"wandb sync {here}"
        else:
            self.where = str(self._run.url)

    def write(self, row: Row) -> None:
        """A row of its history; the server says from which one on it has none."""
        # It wants its own steps to rise, so that an evaluation comes between two of training.
        place = 2 * int(row["step"]) + ("eval_loss" in row)
        if place >= self._run.starting_step:
            self._run.log(named_there(row) | {STEP: int(row["step"])}, step=place, commit=True)

    def close(self, *, whole: bool) -> None:
        """Upload the rest."""
        self._run.finish(exit_code=0 if whole else 1)

    @staticmethod
    def barred() -> str | None:
        """Whether nobody is logged in, or the server does not know who it is."""
        import wandb

        if wandb.setup().settings.mode not in ("online", "run", "shared"):
            return None
        if wandb.login(prompt=False, verify=True):
            return None
        return "nobody is logged in; `wandb login`, or WANDB_MODE=offline to keep it here"

    @staticmethod
    def failures() -> tuple[type[Exception], ...]:
        """Its own, and those of the process that it talks to."""
        import wandb

        return (*FAILURES, wandb.Error)
