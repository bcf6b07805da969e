"""TensorBoard: event files in the run folder, by tensorboardX, which needs no TensorFlow."""

import json
import time
from typing import Any

from mlx_dpo.reporting.trackers.base import FAILURES, Announced, Row, named_there


class TensorBoard:
    """Event files in the run folder."""

    name = "tensorboard"
    library = "tensorboardX"

    def __init__(self, told: Announced) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog
        from tensorboardX.summary import text

        folder = told.folder / "tensorboard"
        folder.mkdir(exist_ok=True)
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self.where = f"tensorboard --logdir {folder}"
        # Written at once: tensorboardX's own writer has a thread, which a full disk ends unheard.
        self._writer = EventsWriter(str(folder / "events"))
        # A TensorBoard that is looking forgets what it read of the files that are gone.
        self._event(session_log=SessionLog(status=SessionLog.START))
        self._event(summary=text("settings", f"```\n{json.dumps(told.settings, indent=2)}\n```"))

    def write(self, row: Row) -> None:
        """One event with all values of the row."""
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=k, simple_value=v) for k, v in named_there(row).items()]
        self._event(step=int(row["step"]), summary=Summary(value=values))

    def close(self, *, whole: bool) -> None:
        """Close the file."""
        self._writer.close()

    def _event(self, **what: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(wall_time=time.time(), **what))
        self._writer.flush()

    @staticmethod
    def barred() -> str | None:
        """Nothing bars it."""
        return None

    @staticmethod
    def failures() -> tuple[type[Exception], ...]:
        """Those of disks."""
        return FAILURES
