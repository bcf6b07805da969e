"""SwanLab as a tracker. It receives only metrics and settings."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from mlx_dpo.trackers.base import (
    COMMON_ERRORS,
    DEFAULT_PROJECT,
    RunInfo,
    remove_other_folders,
    with_transformers_names,
)
from mlx_dpo.types import MetricsRow


class SwanLab:
    """A SwanLab run: uploaded, or stored for `swanlab sync`, depending on `SWANLAB_MODE`."""

    name: ClassVar[str] = "swanlab"
    library: ClassVar[str] = "swanlab"
    has_run_names: ClassVar[bool] = True

    def __init__(self, run: RunInfo) -> None:
        import swanlab

        settings = self._settings()
        folder = run.folder / "swanlog"
        with _restored_sigint_handler():
            self._run = swanlab.init(
                project=run.project or settings.project.name or DEFAULT_PROJECT,
                name=run.name,
                id=run.id,
                resume="allow",
                log_dir=str(folder),
                config=dict(run.settings),
                settings=settings,
            )
        run_folders = sorted(folder.glob(f"run-*-{run.id}"))
        if run_folders:
            remove_other_folders(run_folders[-1], run_folders)
        local = f"swanlab sync {run_folders[-1]}" if run_folders else "disabled by SWANLAB_MODE"
        self.location = self._run.url if settings.mode == "online" else local

    @staticmethod
    def _settings() -> Any:
        """Return SwanLab settings that record no output, code, paths, packages or hardware."""
        import swanlab

        probes = ("hardware", "runtime", "requirements", "conda", "git", "swanlab", "monitor")
        return swanlab.Settings(
            interactive=False,
            probe=swanlab.Settings.Probe(**dict.fromkeys(probes, False)),
            terminal=swanlab.Settings.Terminal(proxy_type="none"),
        )

    def log(self, row: MetricsRow) -> None:
        """Log a metrics row; SwanLab ignores steps that its server already has."""
        self._run.log(with_transformers_names(row), step=int(row["step"]))

    def close(self, *, completed: bool) -> None:
        """Finish the SwanLab run as completed or as crashed; SwanLab uploads the remaining rows."""
        with _restored_sigint_handler():
            if completed:
                self._run.finish()
            else:
                self._run.finish(state="crashed", error="the run was interrupted")

    @classmethod
    def unavailable(cls) -> str | None:
        """Return a hint to log in if runs are uploaded without a login, else None."""
        settings = cls._settings()
        if settings.mode == "online" and settings.api_key is None:
            return "not logged in; run `swanlab login`, or set SWANLAB_MODE=offline to log locally"
        return None

    @staticmethod
    def library_errors() -> tuple[type[Exception], ...]:
        """Return the exception classes common to all trackers and those of SwanLab."""
        from swanlab.exceptions import AuthenticationError, DataStoreError

        return (*COMMON_ERRORS, AuthenticationError, DataStoreError)


@contextmanager
def _restored_sigint_handler() -> Iterator[None]:
    """Restore this program's Ctrl-C handler after the block, as SwanLab installs its own handler.

    This program's handler saves the run before it exits.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)
