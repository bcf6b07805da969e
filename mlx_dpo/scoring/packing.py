"""Packed sequences with shared prefixes: all pairs in one row, each prompt once, no padding.

A row holds prompt, chosen and rejected completion of one pair after another. A token's index in
the row is then neither its position in its text nor the number of tokens that it attends to.
Models of mlx-lm ask their KV cache for both. The cache given to them here returns objects that
refer to the row, and MLX's attention and RoPE functions, replaced for the time of the pass, read
positions and masks from it. A model that computes with positions itself, or needs its mask as an
array, raises an error, and another scorer is selected for it.

Shape letters: T tokens in the row, n predicted tokens, D width of hidden states, C queries and
S keys of a chunk.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from mlx_dpo.data.batching import padded_width
from mlx_dpo.scoring.backbone import ModelParts, UnsupportedModelError
from mlx_dpo.scoring.kernels.attention import QueryChunk
from mlx_dpo.scoring.kernels.attention_dispatch import StructuredMask, use_structured_masks
from mlx_dpo.scoring.kernels.rope import TokenPositions, use_token_positions
from mlx_dpo.types import TokenizedPair

ATTENTION_CACHES = (KVCache, RotatingKVCache)  # caches of layers that mix tokens by attention only


def packed_hidden_states(
    model: nn.Module, parts: ModelParts, pairs: Sequence[TokenizedPair]
) -> mx.array:
    """Return the hidden states that predict the tokens of all completions. (n, D)

    In the order of `shared_prefix.completion_hidden_states`. Gradients flow through the prompts.

    Raises:
        UnsupportedModelError: a layer mixes tokens by other means than attention.
    """
    caches = make_prompt_cache(model)
    if not all(type(cache) in ATTENTION_CACHES for cache in caches):
        raise UnsupportedModelError("layers without attention process tokens one after another")
    row = PackedRow(pairs)
    with use_structured_masks(), use_token_positions():
        hidden = parts.hidden_states(row.tokens, [PackedCache(row) for _ in caches])
    return hidden[0][row.prediction_indices()]


class PairSpan(NamedTuple):
    """The tokens of a pair in the row: index of the first one, and their number by part."""

    start: int
    prompt: int
    chosen: int
    rejected: int

    @property
    def end(self) -> int:
        """One past the last token of the pair."""
        return self.start + self.prompt + self.chosen + self.rejected


class PackedRow:
    """A row of pairs: token ids, positions and attention masks.

    The last token of a completion predicts nothing and is left out.
    """

    def __init__(self, pairs: Sequence[TokenizedPair]) -> None:
        """Concatenate `pairs`."""
        ids: list[int] = []
        self.spans: list[PairSpan] = []
        for pair in pairs:
            parts = (pair.prompt, pair.chosen[:-1], pair.rejected[:-1])
            self.spans.append(PairSpan(len(ids), *map(len, parts)))
            ids.extend(token for part in parts for token in part)
        padding = padded_width(len(ids)) - len(ids)
        if padding:  # a text of its own: no token of a pair attends to it
            self.spans.append(PairSpan(len(ids), padding, 0, 0))
            ids += padding * [0]
        self.num_pairs = len(pairs)
        self.tokens = mx.array(ids)[None]  # (1, T)
        self.positions = np.concatenate([_text_positions(span) for span in self.spans])  # (T,)
        self.rope_offset = TokenPositions(self.positions)  # one object, so that layers share it
        self._chunks: dict[Any, list[QueryChunk]] = {}

    def __len__(self) -> int:
        """Return the number of tokens in the row."""
        return len(self.positions)

    def prediction_indices(self) -> mx.array:
        """Return the indices of the tokens that predict completion tokens. (n,)

        Those of all chosen completions come first, then those of all rejected ones. The first
        token of each completion is predicted by the last token of the prompt.
        """
        chosen, rejected = [], []
        for span in self.spans[: self.num_pairs]:
            last, first = span.start + span.prompt - 1, span.start + span.prompt
            chosen += [last, *range(first, first + span.chosen)]
            rejected += [last, *range(first + span.chosen, span.end)]
        return mx.array(chosen + rejected)

    def chunks(self, size: int, dtype: mx.Dtype, window: int | None) -> list[QueryChunk]:
        """Return chunks of up to `size` queries and their masks, at most one pair per chunk.

        Chunks are cached, because all layers with the same window share them.
        """
        key = size, dtype, window
        if key not in self._chunks:
            self._chunks[key] = [
                chunk for span in self.spans for chunk in _query_chunks(span, size, dtype, window)
            ]
        return self._chunks[key]


def _text_positions(span: PairSpan) -> np.ndarray:
    """Return the positions of a pair's tokens in their texts: both completions follow the prompt.

    (prompt + chosen + rejected,)
    """
    completions = (span.prompt + np.arange(count) for count in (span.chosen, span.rejected))
    return np.concatenate([np.arange(span.prompt), *completions])


def _query_chunks(
    span: PairSpan, size: int, dtype: mx.Dtype, window: int | None
) -> Iterator[QueryChunk]:
    """Yield the chunks of one pair.

    A token attends to the prompt and to its own completion, up to itself, and no further back
    than `window` positions.
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
        mask = mx.array(np.where(visible[:, first:], 0.0, -np.inf).astype(np.float32))  # (C, S)
        offset = span.start
        yield QueryChunk(
            offset + start, offset + end, offset + first, offset + end, mask.astype(dtype)
        )


class PackedMask(StructuredMask):
    """The mask of a packed row: each token attends to its own pair, up to itself."""

    __slots__ = ("row", "window")

    def __init__(self, row: PackedRow, window: int | None) -> None:
        """Mask `row`, with a sliding window of so many positions, or None."""
        self.row, self.window = row, window

    def chunks(self, size: int, dtype: mx.Dtype) -> list[QueryChunk]:
        """Return the chunks of the row."""
        return self.row.chunks(size, dtype, self.window)


class PackedCache:
    """Stand-in for the KV cache of a layer, which gives a model the row's positions and masks.

    It stores nothing: the whole row goes through the layer at once.
    """

    def __init__(self, row: PackedRow) -> None:
        """Serve one pass of `row`."""
        self.row = row
        self.offset = row.rope_offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return `keys` and `values`: there are no earlier ones."""
        return keys, values

    def make_mask(
        self, length: int, *, return_array: bool = False, window_size: int | None = None
    ) -> PackedMask:
        """Return the mask, which mlx-lm passes on to the attention function."""
        if return_array or length != len(self.row):
            raise TypeError("its attention needs the mask as an array")
        return PackedMask(self.row, window_size)
