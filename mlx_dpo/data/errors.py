"""Faults of a single pair: the row is well formed, but there is nothing in it to learn."""

from collections.abc import Callable

from mlx_dpo.errors import DataError

EMPTY_COMPLETION = "a completion is empty"
SAME_TEXT = "chosen and rejected are the same text"
SAME_TOKENS = "chosen and rejected are the same tokens"
DIFFERENT_PROMPTS = "the dialogues differ before the last answer"
EMPTY_PROMPT = "the prompt is empty"
NO_ROOM = "the prompt leaves no room for a completion"
SAME_AFTER_TRUNCATION = "chosen and rejected are the same once cut"
TOO_LONG = "the pair is too long"
NOT_TEXT = "it holds images, audio or video, and only text is trained on"
TIED = "completions are rated alike"
UNPAIRED = "no answer of the other kind to the same prompt"
TEMPLATE_ERROR = "the model's chat template refuses the conversation"
SPECIAL_TOKEN = "a special token of the model in its text cannot be kept as plain text"

ALWAYS_DROPPED = (TOO_LONG, TIED, UNPAIRED)  # what a setting or a row says itself; never an error


class PromptBoundaryError(DataError):
    """Nothing says where a completion begins; no setting leaves such a pair out."""


class BadPairError(DataError):
    """A pair that cannot be trained on; it may be left out and counted under its `reason`."""

    def __init__(
        self, location: str, reason: str, found: str = "", *, advice: str = "mend it"
    ) -> None:
        self.location = location
        self.reason = reason
        self._given = (location, reason, found, advice)
        shown = f" ({found})" if found else ""
        super().__init__(
            f"{location}: {reason}{shown}; {advice}, or leave such pairs out with --bad-pairs drop"
        )

    def __reduce__(self) -> tuple[Callable[..., "BadPairError"], tuple[str, ...]]:
        # As all exceptions, it would be made again from its message alone.
        return _rebuild, self._given


def _rebuild(location: str, reason: str, found: str, advice: str) -> BadPairError:
    return BadPairError(location, reason, found, advice=advice)
