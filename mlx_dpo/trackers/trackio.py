"""trackio as a tracker. It receives only metrics and settings."""

import os
import shlex
import sqlite3
from typing import ClassVar

from mlx_dpo.trackers.base import COMMON_ERRORS, DEFAULT_PROJECT, RunInfo, with_transformers_names
from mlx_dpo.types import MetricsRow


class Trackio:
    """A trackio run in the local database, or on the server that the environment names.

    The environment variables are `TRACKIO_SPACE_ID` and `TRACKIO_SERVER_URL`.
    """

    name: ClassVar[str] = "trackio"
    library: ClassVar[str] = "trackio"
    has_run_names: ClassVar[bool] = True

    def __init__(self, run: RunInfo) -> None:
        import trackio

        project = run.project or DEFAULT_PROJECT
        name = f"{run.name}-{run.id[:6]}"  # trackio identifies a run by its name alone
        server = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")
        self._last_logged_step = run.last_logged_step if server else 0
        if not server:
            self._delete_local_run(project, name)
        self._run = trackio.init(
            project=project,
            name=name,
            config=dict(run.settings),
            resume="allow",
            private=True,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        public_address = server and server.partition("?")[0]  # the query may hold a password
        self.location = public_address or f"trackio show --project {shlex.quote(project)}"

    @staticmethod
    def _delete_local_run(project: str, name: str) -> None:
        import trackio

        try:
            runs = list(trackio.Api().runs(project))
        except ValueError:  # the project is new
            return
        for run in runs:
            if run.name == name:
                run.delete()

    def log(self, row: MetricsRow) -> None:
        """Log a metrics row, unless an earlier process has logged the step to the server."""
        if row["step"] > self._last_logged_step:
            self._run.log(with_transformers_names(row), step=int(row["step"]))

    def close(self, *, completed: bool) -> None:
        """Finish the trackio run, and wait until all rows are stored."""
        import trackio

        trackio.finish()

    @classmethod
    def unavailable(cls) -> str | None:
        """Return a hint to log in if runs go to a Hugging Face Space without a login, else None."""
        from huggingface_hub import get_token

        if os.environ.get("TRACKIO_SPACE_ID") and get_token() is None:
            return "not logged in; run `hf auth login`, or unset TRACKIO_SPACE_ID"
        return None

    @staticmethod
    def library_errors() -> tuple[type[Exception], ...]:
        """Return the exception classes common to all trackers, and SQLite's exception class."""
        return (*COMMON_ERRORS, sqlite3.Error)
