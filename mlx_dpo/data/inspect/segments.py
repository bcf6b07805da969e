"""Split a tokenized pair into segments of text: the prompt, scored tokens and truncated tokens."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from mlx_dpo.data.tokenization.special_tokens import get_special_tokens
from mlx_dpo.types import TokenizedPair

PROMPT, SCORED, CUT = "prompt", "scored", "cut"
Ids = tuple[int, ...]


class TokenText(NamedTuple):
    """Text of one or more tokens."""

    text: str
    special: bool  # a special token, not characters that somebody typed


class Segment(NamedTuple):
    """Consecutive tokens of a pair that are treated alike."""

    name: str  # `prompt`, `chosen`, `rejected`, or `answer` for an unpaired example
    kind: str  # `prompt`: context only; `scored`; `cut`: removed by truncation
    tokens: int
    pieces: list[TokenText]


def segment_pair(tokenizer: Any, full: TokenizedPair, truncated: TokenizedPair) -> list[Segment]:
    """Return the segments of a pair in the order of its tokens, with the truncated ones."""
    segments = [
        ("prompt", kind, ids) for kind, ids in _split_prompt(full.prompt, truncated.prompt) if ids
    ]
    names = ("chosen", "rejected") if truncated.desirable is None else ("answer",)
    for name, completion in zip(names, ("chosen", "rejected"), strict=False):
        ids, scored = getattr(full, completion), getattr(truncated, completion)
        segments.append((name, SCORED, scored))
        if len(ids) > len(scored):
            segments.append((name, CUT, ids[len(scored) :]))
    return [Segment(name, kind, len(ids), _decode(tokenizer, ids)) for name, kind, ids in segments]


def _split_prompt(full: Ids, truncated: Ids) -> Iterable[tuple[str, Ids]]:
    """Return kinds and tokens of a prompt, which is truncated at its start, after the BOS."""
    missing = len(full) - len(truncated)
    start = 0 if truncated == full[missing:] else 1
    return (
        (PROMPT, full[:start]),
        (CUT, full[start : start + missing]),
        (PROMPT, full[start + missing :]),
    )


def _decode(tokenizer: Any, ids: Sequence[int]) -> list[TokenText]:
    special_ids = get_special_tokens(tokenizer).ids
    pieces, begin = [], 0
    for end in _piece_ends(ids, special_ids):
        is_special = ids[begin] in special_ids
        pieces.append(TokenText(_decode_piece(tokenizer, ids, begin, end), is_special))
        begin = end
    return pieces


def _piece_ends(ids: Sequence[int], special_ids: frozenset[int]) -> Iterator[int]:
    """Yield the end of each piece: one special token, or all tokens up to the next one."""
    for i in range(1, len(ids) + 1):
        if i == len(ids) or ids[i] in special_ids or ids[i - 1] in special_ids:
            yield i


def _decode_piece(tokenizer: Any, ids: Sequence[int], begin: int, end: int) -> str:
    before, text = (tokenizer.decode(list(ids[:stop])) for stop in (begin, end))
    # Some decoders drop a space at the beginning of a text, so pieces are decoded in context.
    if begin and text.startswith(before):
        return str(text[len(before) :])
    return str(tokenizer.decode(list(ids[begin:end])))
