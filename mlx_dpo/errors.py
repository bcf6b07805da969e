"""The errors a user can fix. Anything else is a bug and keeps its traceback.

    DPOError
    ├── ConfigError      a setting is unknown, out of range, without effect or contradicts another
    ├── DataError        preferences cannot be read, or nothing is left of them
    ├── ModelError       a model cannot be found, loaded, converted or adapted
    ├── RunError         a run folder is taken, foreign, unfinished or cannot be written
    └── TrainingError    training went wrong (a loss that is not a number)

Messages read `where: what is wrong (what was found); what to do`, on one line.
"""


class DPOError(Exception):
    """Base class: the message is written for the person at the terminal."""


class ConfigError(DPOError):
    """A setting is unknown, out of range, without effect, or contradicts another."""


class DataError(DPOError):
    """Preferences cannot be read as prompt, chosen, rejected, or none is left."""


class ModelError(DPOError):
    """A model cannot be found, loaded, converted or adapted."""


class RunError(DPOError):
    """A run folder is taken, belongs to other settings, is unfinished or cannot be written."""


class TrainingError(DPOError):
    """Training cannot go on: a loss or a gradient is not a number."""


def reason(error: BaseException) -> str:
    """What an error of the system or of another library says, in one short line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__
