"""Faults of a single pair: the row is well formed, but there is nothing in it to learn."""

from collections.abc import Callable

from mlx_dpo.errors import DataError

EMPTY = "a completion is empty"
SAME_TEXT = "chosen and rejected are the same text"
SAME_TOKENS = "chosen and rejected are the same tokens"
DIVERGED = "the dialogues differ before the last answer"
EMPTY_PROMPT = "the prompt is empty"
NO_ROOM = "the prompt leaves no room for a completion"
SAME_WHEN_CUT = "chosen and rejected are the same once cut"
TOO_LONG = "the pair is too long"
NOT_TEXT = "it holds images, audio or video, and only text is trained on"
TIED = "completions are rated alike"
UNPAIRED = "no answer of the other kind to the same prompt"
REFUSED = "the model's chat template refuses the conversation"
SPECIAL = "a special token of the model in its text cannot be kept as plain text"

ASKED_FOR = (TOO_LONG, TIED, UNPAIRED)  # what a setting or a row says itself; never an error


class NoBoundary(DataError):  # noqa: N818 -- the template is at fault
    """Nothing says where a completion begins; no setting leaves such a pair out."""


class BadPair(DataError):  # noqa: N818 -- a pair is at fault, not the program
    """A pair that cannot be trained on; it may be left out and counted under its `reason`."""

    def __init__(
        self, location: str, reason: str, found: str = "", *, mend: str = "mend it"
    ) -> None:
        self.location = location
        self.reason = reason
        self._given = (location, reason, found, mend)
        shown = f" ({found})" if found else ""
        super().__init__(
            f"{location}: {reason}{shown}; {mend}, or leave such pairs out with --bad-pairs drop"
        )

    def __reduce__(self) -> tuple[Callable[..., "BadPair"], tuple[str, ...]]:
        # As all exceptions, it would be made again from its message alone.
        return _again, self._given


def _again(location: str, reason: str, found: str, mend: str) -> BadPair:
    return BadPair(location, reason, found, mend=mend)
