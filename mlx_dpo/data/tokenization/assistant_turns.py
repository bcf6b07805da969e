"""Find the tokens of the assistant's turns in a conversation, for instruction tuning.

The bounds of each turn are checked on token ids, as the boundary of prompt and completion is: the
conversation up to a turn, with the beginning of an answer, must be a prefix of the whole, and so
must the conversation up to the turn's end. A template that writes earlier turns in another way once
later turns follow, for example without their reasoning, is refused.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from mlx_dpo.errors import PromptBoundaryError
from mlx_dpo.types import Message

Ids = tuple[int, ...]
Bounds = tuple[int, int]


def find_gaps(
    turns: Sequence[Message],
    first: int,
    whole: Ids,
    *,
    encode: Callable[[int, bool], Ids],
    starts_with: Callable[[int, bool], bool],
    trim: Callable[[Ids], Ids],
    location: str,
) -> list[Bounds]:
    """Return the ranges of `whole` between two scored turns, none for a single answer.

    Args:
        turns: all turns of the conversation.
        first: index of the first scored turn.
        whole: token ids of the conversation.
        encode: function that returns the token ids of the first n turns, with the beginning of an
            answer if its second argument is True.
        starts_with: function that returns whether the text of `whole` begins with that text.
        trim: function that cuts what follows the stop token of a turn.
        location: of the row, for errors.

    Raises:
        PromptBoundaryError: the template changes a turn once later turns follow.
    """
    runs = list(_assistant_runs(turns, first))
    gaps = []
    for (_, end), (start, _) in pairwise(runs):
        through, before = encode(end, False), encode(start, True)
        for ids, count, opens in ((through, end, False), (before, start, True)):
            if whole[: len(ids)] != ids and not starts_with(count, opens):
                raise changed_turn_error(location, count)
        # A token that spans the start of a turn is scored, one that spans its end is not.
        gaps.append((len(trim(_shared(through, whole))), len(_shared(before, whole))))
    return gaps


def changed_turn_error(location: str, count: int) -> PromptBoundaryError:
    """Return the error for a template that changes the first `count` turns if others follow."""
    return PromptBoundaryError(
        f"{location}: the chat template changes earlier turns once later ones follow (turn "
        f"{count}; many templates leave out earlier reasoning), so that not every answer can be "
        "scored as it is generated; use --assistant-turns last, which scores the last one alone"
    )


def has_several_answers(turns: Sequence[Message]) -> bool:
    """Return True if there are turns of others between two turns of the assistant."""
    return len(list(_assistant_runs(turns, 0))) > 1


def _assistant_runs(turns: Sequence[Message], first: int) -> Iterator[Bounds]:
    """Yield (start, end) of each run of consecutive turns of the assistant from `first` on."""
    start = None
    for number in range(first, len(turns) + 1):
        is_own = number < len(turns) and turns[number]["role"] == "assistant"
        if is_own and start is None:
            start = number
        elif not is_own and start is not None:
            yield start, number
            start = None


def _shared(ids: Ids, whole: Ids) -> Ids:
    """Return the token ids with which both begin."""
    shorter = min(len(ids), len(whole))
    return whole[: next((i for i in range(shorter) if ids[i] != whole[i]), shorter)]
