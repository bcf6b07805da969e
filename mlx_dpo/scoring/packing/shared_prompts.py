"""Packed sequence of pairs one behind the other: prompt, chosen and rejected completion of each.

Shape letters: those of `packed_sequence`.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_dpo.scoring.kernels.attention import QueryChunk
from mlx_dpo.scoring.packing.packed_sequence import HeadRows, PackedSequence, additive_mask
from mlx_dpo.types import TokenizedPair, scored_completions


class PairSpan(NamedTuple):
    """Location of a pair in the packed sequence: its start index and its token counts."""

    start: int
    prompt: int
    chosen: int
    rejected: int

    @property
    def end(self) -> int:
        """Index after the last token of the pair."""
        return self.start + self.prompt + self.chosen + self.rejected


class SharedPromptSequence(PackedSequence):
    """A packed sequence in which both completions of a pair follow its prompt."""

    def __init__(self, pairs: Sequence[TokenizedPair]) -> None:
        """Pack the tokens of `pairs` into one sequence."""
        ids: list[int] = []
        self.pairs = pairs
        self.spans: list[PairSpan] = []
        for pair in pairs:
            parts = (pair.prompt, pair.chosen[:-1], pair.rejected[:-1])
            self.spans.append(PairSpan(len(ids), *map(len, parts)))
            ids.extend(chain(*parts))
        positions = [_text_positions(span) for span in self.spans]
        super().__init__(np.array(ids, np.int32), np.concatenate(positions))

    def head_rows(self) -> HeadRows:
        """Return a row per predicted token, in order.

        The first token of each completion is predicted by the last token of the prompt.
        """
        chosen, rejected = list[int](), list[int]()
        for span, pair in zip(self.spans, self.pairs, strict=True):
            last, first = span.start + span.prompt - 1, span.start + span.prompt
            predicting = (last, *range(first, first + span.chosen))
            chosen += [predicting[i] for i in pair.scored] if pair.gaps else predicting
            if pair.rejected:
                rejected += [last, *range(first + span.chosen, span.end)]
        targets = list(chain(*scored_completions(self.pairs)))
        return HeadRows(mx.array(chosen + rejected), mx.array(targets), None)

    def make_chunks(self, size: int, dtype: mx.Dtype, window: int | None) -> Iterator[QueryChunk]:
        """Yield chunks of up to `size` queries with their masks; no chunk spans two pairs."""
        spans = self.spans
        if self.padding:  # a text of its own: no token of a pair attends to it
            spans = [*spans, PairSpan(len(self) - self.padding, self.padding, 0, 0)]
        return chain(*(_query_chunks(span, size, dtype, window) for span in spans))


def _text_positions(span: PairSpan) -> np.ndarray:
    """Return each token's position in its own text, a prompt with one completion.

    The positions of each completion continue those of the prompt. The result has one entry per
    token of the pair in the packed sequence, (prompt + chosen + rejected,).
    """
    completions = (span.prompt + np.arange(count) for count in (span.chosen, span.rejected))
    return np.concatenate([np.arange(span.prompt), *completions])


def _query_chunks(
    span: PairSpan, size: int, dtype: mx.Dtype, window: int | None
) -> Iterator[QueryChunk]:
    """Yield the chunks of one pair: ranges of up to `size` queries, each with its mask.

    A token attends to the prompt, and to its own completion up to the token itself. If `window` is
    set, it attends to the last `window` of these positions only.
    """
    positions = _text_positions(span)
    part = np.repeat([0, 1, 2], span[1:])  # 0 prompt, 1 chosen, 2 rejected
    total = len(positions)
    for start in range(0, total, size):
        end = min(start + size, total)
        rows, keys = np.arange(start, end)[:, None], np.arange(end)[None]
        visible = (keys <= rows) & ((part[keys] == 0) | (part[keys] == part[rows]))  # (C, end)
        if window is not None:
            visible &= positions[rows] - positions[keys] < window
        # Keys before the first one that any query sees are not computed at all.
        first = int(visible.any(axis=0).argmax())
        offset = span.start
        seen = ((offset + first, offset + end),)
        yield QueryChunk(
            offset + start, offset + end, seen, additive_mask(visible[:, first:], dtype)
        )
