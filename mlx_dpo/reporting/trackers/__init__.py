"""The programs that can be told of a run; the library of each is imported when a run names it."""

from importlib import import_module

from mlx_dpo.errors import ConfigError, reason
from mlx_dpo.reporting.trackers.base import Announced, Sink, quiet
from mlx_dpo.reporting.trackers.swanlab import SwanLab
from mlx_dpo.reporting.trackers.tensorboard import TensorBoard
from mlx_dpo.reporting.trackers.trackio import Trackio
from mlx_dpo.reporting.trackers.wandb import WandB

Program = type[TensorBoard] | type[WandB] | type[Trackio] | type[SwanLab]
PROGRAMS: dict[str, Program] = {p.name: p for p in (TensorBoard, WandB, Trackio, SwanLab)}


def check(name: str) -> None:
    """Whether a program can be told of a run at all; its library is imported.

    Raises:
        ConfigError: says what is missing, and what to do.
    """
    library = PROGRAMS[name].library
    try:
        with quiet():
            import_module(library)
    except ImportError as error:
        gone = isinstance(error, ModuleNotFoundError) and error.name == library
        what = "is not installed" if gone else f"cannot be loaded ({reason(error)})"
        raise ConfigError(
            f"`report_to` {name}: `{library}` {what}; pip install 'mlx-dpo[{name}]'"
        ) from error
    kind = PROGRAMS[name]
    try:
        with quiet():
            barred = kind.barred()
    except kind.failures() as error:
        barred = f"{reason(error)}; mend it, or leave {name} out"
    if barred is not None:
        raise ConfigError(f"`report_to` {name}: {barred}")


def begin(name: str, told: Announced, heard: list[str] | None = None) -> Sink:
    """A program that is told of the run from here on; what its library warns of is `heard`.

    Raises:
        ConfigError: it cannot be, as its library says.
    """
    kind = PROGRAMS[name]
    try:
        with quiet(name, heard):
            return kind(told)
    except kind.failures() as error:
        raise ConfigError(
            f"`report_to` {name}: cannot begin ({reason(error)}); mend it, or go on with "
            "--resume --report-to none"
        ) from error
