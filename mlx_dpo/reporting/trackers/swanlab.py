"""SwanLab, told rows and settings and no more."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mlx_dpo.config.training import PROJECT
from mlx_dpo.reporting.trackers.base import FAILURES, Announced, Row, named_there, remove_others


class SwanLab:
    """A run of SwanLab, online or, as `SWANLAB_MODE` says, kept here to be synced."""

    name = "swanlab"
    library = "swanlab"

    def __init__(self, told: Announced) -> None:
        import swanlab

        settings = self._settings()
        folder = told.folder / "swanlog"
        with _own_interrupt():
            self._run = swanlab.init(
                project=told.project or settings.project.name or PROJECT,
                name=told.name,
                id=told.id,
                resume="allow",
                log_dir=str(folder),
                config=dict(told.settings),
                settings=settings,
            )
        runs = sorted(folder.glob(f"run-*-{told.id}"))
        if runs:
            remove_others(runs[-1], runs)
        here = f"swanlab sync {runs[-1]}" if runs else "off, as SWANLAB_MODE says"
        self.where = self._run.url if settings.mode == "online" else here

    @staticmethod
    def _settings() -> Any:
        """Nothing but metrics and settings: no screen, code, paths, packages or machine."""
        import swanlab

        kinds = ("hardware", "runtime", "requirements", "conda", "git", "swanlab", "monitor")
        return swanlab.Settings(
            interactive=False,
            probe=swanlab.Settings.Probe(**dict.fromkeys(kinds, False)),
            terminal=swanlab.Settings.Terminal(proxy_type="none"),
        )

    def write(self, row: Row) -> None:
        """Values of the step; SwanLab passes over those that its server has."""
        self._run.log(named_there(row), step=int(row["step"]))

    def close(self, *, whole: bool) -> None:
        """Upload the rest."""
        with _own_interrupt():
            if whole:
                self._run.finish()
            else:
                self._run.finish(state="crashed", error="the run broke off")

    @classmethod
    def barred(cls) -> str | None:
        """Whether nobody is logged in."""
        settings = cls._settings()
        if settings.mode == "online" and settings.api_key is None:
            return "nobody is logged in; `swanlab login`, or SWANLAB_MODE=offline to keep it here"
        return None

    @staticmethod
    def failures() -> tuple[type[Exception], ...]:
        """Its own too."""
        from swanlab.exceptions import AuthenticationError, DataStoreError

        return (*FAILURES, AuthenticationError, DataStoreError)


@contextmanager
def _own_interrupt() -> Iterator[None]:
    """Leave Ctrl-C to this program, which saves; SwanLab would take it for itself."""
    mine = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, mine)
