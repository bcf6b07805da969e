"""Split a tokenized pair into segments for display: prompt, completions and truncated tokens."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from mlx_dpo.data.tokenization.special_tokens import get_special_tokens
from mlx_dpo.types import TokenizedPair

PROMPT, SCORED, CUT = "prompt", "scored", "cut"
Ids = tuple[int, ...]


class TokenText(NamedTuple):
    """Decoded text of one special token, or of several consecutive ordinary tokens."""

    text: str
    special: bool  # the text of a special token


class Segment(NamedTuple):
    """Consecutive tokens of a pair of the same kind: prompt, in the loss, or truncated."""

    name: str  # `prompt`, `chosen`, `rejected`; `answer` of one, and `turns` between two answers
    kind: str  # `prompt`: context only; `scored`: in the loss; `cut`: removed by truncation
    tokens: int
    pieces: list[TokenText]


def segment_pair(tokenizer: Any, full: TokenizedPair, truncated: TokenizedPair) -> list[Segment]:
    """Return the segments of a pair in order, including the tokens that truncation removes.

    Args:
        tokenizer: the tokenizer that decodes the tokens.
        full: the pair before truncation.
        truncated: the same pair after truncation.
    """
    segments = [
        ("prompt", kind, ids) for kind, ids in _split_prompt(full.prompt, truncated.prompt) if ids
    ]
    names = ("chosen", "rejected") if truncated.desirable is None else ("answer",)
    for name, completion in zip(names, ("chosen", "rejected"), strict=False):
        ids, scored = getattr(full, completion), getattr(truncated, completion)
        start = 0
        for gap, end in truncated.gaps:  # only of `chosen`, in instruction tuning
            segments += [(name, SCORED, scored[start:gap]), ("turns", PROMPT, scored[gap:end])]
            start = end
        segments.append((name, SCORED, scored[start:]))
        if len(ids) > len(scored):
            segments.append((name, CUT, ids[len(scored) :]))
    return [Segment(name, kind, len(ids), _decode(tokenizer, ids)) for name, kind, ids in segments]


def _split_prompt(full: Ids, truncated: Ids) -> Iterable[tuple[str, Ids]]:
    """Return (kind, token ids) for each segment of a prompt; a segment may be empty.

    Truncation removes tokens at the start of the prompt, or after its BOS token.
    """
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
    """Yield the end index of each piece: one special token, or a run of ordinary tokens."""
    for i in range(1, len(ids) + 1):
        if i == len(ids) or ids[i] in special_ids or ids[i - 1] in special_ids:
            yield i


def _decode_piece(tokenizer: Any, ids: Sequence[int], begin: int, end: int) -> str:
    before, text = (tokenizer.decode(list(ids[:stop])) for stop in (begin, end))
    # Some decoders drop a space at the beginning of a text, so pieces are decoded in context.
    if begin and text.startswith(before):
        return str(text[len(before) :])
    return str(tokenizer.decode(list(ids[begin:end])))
