"""The table of experiment trackers by name. Only a run that uses a tracker imports its library.

To add a tracker, write a file with a class that follows `Tracker`, and add it to `TRACKERS`.
"""

from importlib import import_module

from mlx_dpo.errors import ConfigError, reason
from mlx_dpo.trackers.base import RunInfo, Tracker, captured_output
from mlx_dpo.trackers.swanlab import SwanLab
from mlx_dpo.trackers.tensorboard import TensorBoard
from mlx_dpo.trackers.trackio import Trackio
from mlx_dpo.trackers.wandb import WandB

TrackerClass = type[TensorBoard] | type[WandB] | type[Trackio] | type[SwanLab]
TRACKERS: dict[str, TrackerClass] = {t.name: t for t in (TensorBoard, WandB, Trackio, SwanLab)}


def check_tracker(name: str) -> None:
    """Check that the library of tracker `name` can be imported and that runs can be logged to it.

    Raises:
        ConfigError: the library is missing or broken, or the user is not logged in.
    """
    tracker_class = TRACKERS[name]
    library = tracker_class.library
    try:
        with captured_output():
            import_module(library)
    except ImportError as error:
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == library
        what = "is not installed" if is_missing else f"cannot be loaded ({reason(error)})"
        raise ConfigError(
            f"`report_to` {name}: `{library}` {what}; pip install 'mlx-dpo[{name}]'"
        ) from error
    try:
        with captured_output():
            problem = tracker_class.unavailable()
    except tracker_class.library_errors() as error:
        problem = f"{reason(error)}; fix it, or leave {name} out"
    if problem is not None:
        raise ConfigError(f"`report_to` {name}: {problem}")


def open_tracker(name: str, run: RunInfo, warned: list[str] | None = None) -> Tracker:
    """Start logging a run to tracker `name`; append the warnings of its library to `warned`.

    Raises:
        ConfigError: the library cannot start the run.
    """
    tracker_class = TRACKERS[name]
    try:
        with captured_output(name, warned):
            return tracker_class(run)
    except tracker_class.library_errors() as error:
        raise ConfigError(
            f"`report_to` {name}: cannot start ({reason(error)}); fix it, or continue with "
            "--resume --report-to none"
        ) from error
