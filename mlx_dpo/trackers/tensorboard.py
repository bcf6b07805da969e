"""TensorBoard as a tracker: event files written by tensorboardX, which needs no TensorFlow."""

import json
import time
from typing import Any, ClassVar

from mlx_dpo.trackers.base import COMMON_ERRORS, RunInfo, with_transformers_names
from mlx_dpo.types import MetricsRow


class TensorBoard:
    """TensorBoard event files in the folder `tensorboard` of the run."""

    name: ClassVar[str] = "tensorboard"
    library: ClassVar[str] = "tensorboardX"
    has_run_names: ClassVar[bool] = False  # TensorBoard names a run after its folder

    def __init__(self, run: RunInfo) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog
        from tensorboardX.summary import text

        folder = run.folder / "tensorboard"
        folder.mkdir(exist_ok=True)
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self.location = f"tensorboard --logdir {folder}"
        # Written synchronously: tensorboardX's SummaryWriter writes in a thread, and a full disk
        # would end the thread without an error here.
        self._writer = EventsWriter(str(folder / "events"))
        # SessionLog.START makes a running TensorBoard drop what it read from the deleted files.
        self._write_event(session_log=SessionLog(status=SessionLog.START))
        settings = f"```\n{json.dumps(run.settings, indent=2)}\n```"
        self._write_event(summary=text("settings", settings))

    def log(self, row: MetricsRow) -> None:
        """Write one event with all metrics of a metrics row."""
        from tensorboardX.proto.summary_pb2 import Summary

        metrics = with_transformers_names(row)
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write_event(step=int(row["step"]), summary=Summary(value=values))

    def close(self, *, completed: bool) -> None:
        """Close the event file."""
        self._writer.close()

    def _write_event(self, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(wall_time=time.time(), **fields))
        self._writer.flush()

    @classmethod
    def unavailable(cls) -> str | None:
        """Return None: TensorBoard needs no login."""
        return None

    @staticmethod
    def library_errors() -> tuple[type[Exception], ...]:
        """Return the exception classes common to all trackers, such as errors in writing files."""
        return COMMON_ERRORS
