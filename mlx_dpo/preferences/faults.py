"""Faults of a single pair: the row is well formed, but there is nothing in it to learn."""

from mlx_dpo.errors import DataError

EMPTY = "a completion is empty"
SAME_TEXT = "chosen and rejected are the same text"
SAME_TOKENS = "chosen and rejected are the same tokens"
DIVERGED = "the dialogues differ before the last answer"
EMPTY_PROMPT = "the prompt is empty"
NO_ROOM = "the prompt leaves no room for a completion"
SAME_WHEN_CUT = "chosen and rejected are the same once cut"
TOO_LONG = "the pair is too long"


class BadPair(DataError):  # noqa: N818 -- a pair is at fault, not the program
    """A pair that cannot be trained on; it may be left out and counted under its `reason`."""

    def __init__(self, where: str, reason: str, found: str = "", *, mend: str = "mend it") -> None:
        self.where = where
        self.reason = reason
        shown = f" ({found})" if found else ""
        super().__init__(
            f"{where}: {reason}{shown}; {mend}, or leave such pairs out with --bad-pairs drop"
        )
