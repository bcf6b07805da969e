"""What gives way in a pair that is longer than `max_length`. Token ids only."""

from collections.abc import Sequence
from dataclasses import replace

from mlx_dpo.preferences.faults import NO_ROOM, SAME_WHEN_CUT, TOO_LONG, BadPair
from mlx_dpo.types import TokenizedPair


def truncate(
    pair: TokenizedPair,
    max_length: int,
    how: str,
    *,
    begins: bool = False,
    turns: Sequence[int] = (),
) -> TokenizedPair:
    """The pair with prompt + completion of at most `max_length` tokens in both rows.

    `keep_start` cuts completions at their end, as TRL does. `keep_end` cuts the prompt at its
    start, the same in both rows, and completions only where they do not fit beside one
    prompt token. `drop` cuts nothing. No completion is ever emptied.

    With `keep_end` the prompt goes on at the first of `turns`, places where one begins, that
    leaves room for the completions; where none does, at any token. If the prompt `begins` with
    the token that begins a text, that token stays.

    Raises:
        BadPair: there is no such pair, or the cut leaves no difference.
    """
    if len(pair) <= max_length:
        return pair
    if how == "drop":
        raise BadPair(pair.where, TOO_LONG, f"{len(pair)} tokens, max_length {max_length}")
    prompt = pair.prompt
    if how == "keep_end":
        longest_completion = len(pair) - len(prompt)
        prompt = _end_of_prompt(prompt, max_length, longest_completion, begins, turns)
    room = max_length - len(prompt)
    if room < 1:
        found = f"prompt of {len(prompt)} tokens, max_length {max_length}"
        raise BadPair(pair.where, NO_ROOM, found, mend="raise --max-length")
    cut = replace(pair, prompt=prompt, chosen=pair.chosen[:room], rejected=pair.rejected[:room])
    if cut.chosen == cut.rejected:
        found = f"max_length {max_length}"
        raise BadPair(pair.where, SAME_WHEN_CUT, found, mend="raise --max-length")
    return cut


def _end_of_prompt(
    prompt: tuple[int, ...],
    max_length: int,
    longest_completion: int,
    begins: bool,
    turns: Sequence[int],
) -> tuple[int, ...]:
    # One token that begins, one of the prompt and one of a completion are the least.
    start = prompt[: int(begins and max_length > 2)]
    kept = max(1, max_length - longest_completion - len(start))
    if kept + len(start) >= len(prompt):
        return prompt
    earliest = len(prompt) - kept
    return start + prompt[next((turn for turn in turns if turn >= earliest), earliest) :]
