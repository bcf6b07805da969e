"""Errors that a user can fix. Any other exception is a bug and keeps its traceback.

    DPOError
    ├── ConfigError      a setting is unknown, out of range, without effect or contradicts another
    ├── DataError                preference data cannot be read, or no pair is left
    │   ├── BadPairError         a pair cannot be trained on; it may be left out
    │   └── PromptBoundaryError  the chat template does not show where the completion begins
    ├── ModelError       a model cannot be found, loaded, converted or adapted
    ├── RunError         a run folder is in use, has other settings, is unfinished or unwritable
    │   └── DamagedFileError     a file that mlx-dpo wrote does not match its checksum
    └── TrainingError    training went wrong (a loss that is not a number)

Messages read `where: what is wrong (what was found); what to do`, on one line.
"""

import os
from collections.abc import Callable

# Reasons of a `BadPairError`.
EMPTY_COMPLETION = "a completion is empty"
SAME_TEXT = "chosen and rejected are the same text"
SAME_TOKENS = "chosen and rejected are the same tokens"
DIFFERENT_PROMPTS = "the dialogues differ before the last answer"
EMPTY_PROMPT = "the prompt is empty"
NO_ROOM = "the prompt leaves no room for a completion"
SAME_AFTER_TRUNCATION = "chosen and rejected are the same after truncation"
TOO_LONG = "the pair is too long"
NOT_TEXT = "images, audio and video are not supported"
TIED = "all completions have the same rating"
UNPAIRED = "the prompt has no answer with the other label"
UNJUDGED = "nobody has judged the answers"
TEMPLATE_ERROR = "the model's chat template refuses the conversation"
NOT_WRITTEN = "the model's chat template drops a part of the conversation"
SPECIAL_TOKEN = "a special token of the model in its text cannot be encoded as plain text"

# Never an error: a setting or a rating asks for it, or there is no judgement yet.
ALWAYS_DROPPED = (TOO_LONG, TIED, UNPAIRED, UNJUDGED)


class DPOError(Exception):
    """Base class of errors that the user can fix; the message is shown without a traceback."""

    is_shared = False  # whether all ranks of a run raise it, so that one message is enough


class ConfigError(DPOError):
    """A setting is unknown, out of range, without effect, or contradicts another."""


class DataError(DPOError):
    """Preference data cannot be read as prompt, chosen and rejected, or no pair is left."""


class PromptBoundaryError(DataError):
    """The chat template does not show where the completion begins.

    Such a pair cannot be left out with `--bad-pairs drop`.
    """


class BadPairError(DataError):
    """A pair cannot be trained on; `--bad-pairs drop` leaves it out and counts it by `reason`."""

    def __init__(
        self, location: str, reason: str, found: str = "", *, advice: str = "fix it"
    ) -> None:
        self.location = location
        self.reason = reason
        self.found = found
        self._arguments = (location, reason, found, advice)
        shown = f" ({found})" if found else ""
        super().__init__(
            f"{location}: {reason}{shown}; {advice}, or drop such pairs with --bad-pairs drop"
        )

    def __reduce__(self) -> tuple[Callable[..., "BadPairError"], tuple[str, ...]]:
        # By default, pickle would rebuild the exception from its message alone.
        return _rebuild_bad_pair, self._arguments


def _rebuild_bad_pair(location: str, reason: str, found: str, advice: str) -> BadPairError:
    return BadPairError(location, reason, found, advice=advice)


class ModelError(DPOError):
    """A model cannot be found, loaded, converted or adapted."""


class RunError(DPOError):
    """A run folder is in use, has other settings, is unfinished or cannot be written."""


class DamagedFileError(RunError):
    """A file that mlx-dpo wrote does not have the content that was written."""

    def __init__(self, fault: str, advice: str = "") -> None:
        self.fault = fault  # the file and what is wrong with it
        super().__init__(f"{fault}; {advice}" if advice else fault)


class TrainingError(DPOError):
    """Training cannot continue: a loss or a gradient is not a number."""


def shows_tracebacks() -> bool:
    """Return whether the user asks for tracebacks, with the environment variable MLX_DPO_DEBUG."""
    return os.environ.get("MLX_DPO_DEBUG", "0") not in ("", "0")


def reason(error: BaseException) -> str:
    """Return the message of an error of the system or of another library, as one short line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__
