"""A tokenized pair -> its text in parts: what is read, what is scored, what was cut.

Knows tokens and no terminal.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from mlx_dpo.data.tokenization.special_tokens import get_special_tokens
from mlx_dpo.types import TokenizedPair

PROMPT, SCORED, CUT = "prompt", "scored", "cut"
Ids = tuple[int, ...]


class Piece(NamedTuple):
    """Text of one or more tokens."""

    text: str
    special: bool  # a control token, not characters that somebody typed


class Part(NamedTuple):
    """Tokens of a pair that are treated alike."""

    name: str  # `prompt`, `chosen`, `rejected`, or `answer` where it was judged by itself
    kind: str  # `prompt`: read; `scored`; `cut`: not seen at all
    tokens: int
    pieces: list[Piece]


def parts_of(tokenizer: Any, whole: TokenizedPair, kept: TokenizedPair) -> list[Part]:
    """The parts of a pair in the order in which the model meets them, cut ones in their places."""
    found = [("prompt", kind, ids) for kind, ids in _of_prompt(whole.prompt, kept.prompt) if ids]
    names = ("chosen", "rejected") if kept.desirable is None else ("answer",)
    for name, side in zip(names, ("chosen", "rejected"), strict=False):
        all_of_it, scored = getattr(whole, side), getattr(kept, side)
        found.append((name, SCORED, scored))
        if len(all_of_it) > len(scored):
            found.append((name, CUT, all_of_it[len(scored) :]))
    return [Part(name, kind, len(ids), _pieces(tokenizer, ids)) for name, kind, ids in found]


def _of_prompt(whole: Ids, kept: Ids) -> Iterable[tuple[str, Ids]]:
    """A prompt is cut at its start, but for the token that begins a text."""
    missing = len(whole) - len(kept)
    head = 0 if kept == whole[missing:] else 1
    return (
        (PROMPT, whole[:head]),
        (CUT, whole[head : head + missing]),
        (PROMPT, whole[head + missing :]),
    )


def _pieces(tokenizer: Any, ids: Sequence[int]) -> list[Piece]:
    specials = get_special_tokens(tokenizer).ids
    pieces, begin = [], 0
    for end in _ends(ids, specials):
        special = ids[begin] in specials
        pieces.append(Piece(_text(tokenizer, ids, begin, end), special))
        begin = end
    return pieces


def _ends(ids: Sequence[int], specials: frozenset[int]) -> Iterator[int]:
    """Each special token stands by itself, others go together."""
    for at in range(1, len(ids) + 1):
        if at == len(ids) or ids[at] in specials or ids[at - 1] in specials:
            yield at


def _text(tokenizer: Any, ids: Sequence[int], begin: int, end: int) -> str:
    before, both = (tokenizer.decode(list(ids[:at])) for at in (begin, end))
    # Some decoders drop the space that a text begins with: so pieces are read in their place.
    if begin and both.startswith(before):
        return str(both[len(before) :])
    return str(tokenizer.decode(list(ids[begin:end])))
