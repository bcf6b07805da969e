"""trackio, told rows and settings and no more."""

import os
import shlex
import sqlite3

from mlx_dpo.config.training import PROJECT
from mlx_dpo.reporting.trackers.base import FAILURES, Announced, Row, named_there


class Trackio:
    """A run in trackio's database on this machine, or on a Space or server as `TRACKIO_…` says."""

    name = "trackio"
    library = "trackio"

    def __init__(self, told: Announced) -> None:
        import trackio

        project = told.project or PROJECT
        name = f"{told.name}-{told.id[:6]}"  # it knows runs by their names alone
        place = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")
        self._before = told.before if place else 0
        if not place:
            self._forget(project, name)
        self._run = trackio.init(
            project=project,
            name=name,
            config=dict(told.settings),
            resume="allow",
            private=True,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        shown = place and place.partition("?")[0]  # a server's address may hold a password
        self.where = shown or f"trackio show --project {shlex.quote(project)}"

    @staticmethod
    def _forget(project: str, name: str) -> None:
        import trackio

        try:
            runs = list(trackio.Api().runs(project))
        except ValueError:  # the project is new
            return
        for run in runs:
            if run.name == name:
                run.delete()

    def write(self, row: Row) -> None:
        """A row of the step; a Space was told those up to the last checkpoint before."""
        if row["step"] > self._before:
            self._run.log(named_there(row), step=int(row["step"]))

    def close(self, *, whole: bool) -> None:
        """Wait until the rest is in the database."""
        import trackio

        trackio.finish()

    @staticmethod
    def barred() -> str | None:
        """Whether a Space is meant, and nobody is logged in to the Hub."""
        from huggingface_hub import get_token

        if os.environ.get("TRACKIO_SPACE_ID") and get_token() is None:
            return "nobody is logged in; `hf auth login`, or unset TRACKIO_SPACE_ID"
        return None

    @staticmethod
    def failures() -> tuple[type[Exception], ...]:
        """Those of its database too; it takes most upon itself and says so."""
        return (*FAILURES, sqlite3.Error)
