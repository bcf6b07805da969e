"""Pack all pairs of a batch into one sequence, with each prompt once and no padding between them.

The packed sequence holds the prompt, the chosen and the rejected completion of one pair after
another. A token's index in the packed sequence therefore differs from its position in its text.
mlx-lm's models take positions and attention mask from their KV cache, so they are given a stand-in
for the cache. During the pass, MLX's attention and RoPE functions are replaced by functions that
use the positions and mask of the packed sequence. If the code of a model computes with token
positions, or needs the mask as an array, an error is raised and another scorer is selected.

Shape letters: T tokens in the packed sequence, n predicted tokens, D width of hidden states, C
queries and S keys of a chunk.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from mlx_dpo.data.batches.padding import padded_width
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

    First come all chosen completions, then all rejected ones, each in the order of `pairs`.
    The result can be differentiated; gradients include the contribution of the prompts.

    Raises:
        UnsupportedModelError: a layer combines tokens by other means than attention.
    """
    caches = make_prompt_cache(model)
    if not all(type(cache) in ATTENTION_CACHES for cache in caches):
        raise UnsupportedModelError("layers without attention process tokens one after another")
    sequence = PackedSequence(pairs)
    with use_structured_masks(), use_token_positions():
        hidden = parts.hidden_states(sequence.tokens, [PackedCache(sequence) for _ in caches])
    return hidden[0][sequence.prediction_indices()]


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


class PackedSequence:
    """A packed sequence of pairs: its token ids, positions and attention masks.

    The last token of each completion is left out, because no token follows it.
    """

    def __init__(self, pairs: Sequence[TokenizedPair]) -> None:
        """Pack the tokens of `pairs` into one sequence."""
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
        """Return the number of tokens in the packed sequence, including padding at its end."""
        return len(self.positions)

    def prediction_indices(self) -> mx.array:
        """Return the indices of the tokens that predict completion tokens. (n,)

        Indices for all chosen completions come first, then those for all rejected completions. The
        first token of each completion is predicted by the last token of the prompt.
        """
        chosen, rejected = [], []
        for span in self.spans[: self.num_pairs]:
            last, first = span.start + span.prompt - 1, span.start + span.prompt
            chosen += [last, *range(first, first + span.chosen)]
            rejected += [last, *range(first + span.chosen, span.end)]
        return mx.array(chosen + rejected)

    def chunks(self, size: int, dtype: mx.Dtype, window: int | None) -> list[QueryChunk]:
        """Return chunks of up to `size` queries with their masks; no chunk spans two pairs.

        Chunks are cached, because all layers with the same sliding `window` use the same chunks.
        """
        key = size, dtype, window
        if key not in self._chunks:
            self._chunks[key] = [
                chunk for span in self.spans for chunk in _query_chunks(span, size, dtype, window)
            ]
        return self._chunks[key]


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
        mask = mx.array(np.where(visible[:, first:], 0.0, -np.inf).astype(np.float32))  # (C, S)
        offset = span.start
        seen = ((offset + first, offset + end),)
        yield QueryChunk(offset + start, offset + end, seen, mask.astype(dtype))


class PackedMask(StructuredMask):
    """Attention mask of a packed sequence.

    Each token attends to its own prompt, and to its own completion up to the token itself. With a
    sliding window, the token attends only to the last `window` of these positions.
    """

    __slots__ = ("sequence", "window")

    def __init__(self, sequence: PackedSequence, window: int | None) -> None:
        """Create the mask of the packed sequence `sequence`.

        Args:
            window: size of the sliding window in positions; None means no window.
        """
        self.sequence, self.window = sequence, window

    def chunks(self, size: int, dtype: mx.Dtype) -> list[QueryChunk]:
        """Return chunks of up to `size` queries with their masks; no chunk spans two pairs."""
        return self.sequence.chunks(size, dtype, self.window)


class PackedCache:
    """Stand-in for a layer's KV cache that provides the positions and masks of a packed sequence.

    The stand-in stores no keys or values, because the whole packed sequence goes through the layer
    at once.
    """

    def __init__(self, sequence: PackedSequence) -> None:
        """Create the stand-in for one pass over the packed sequence `sequence`."""
        self.sequence = sequence
        self.offset = sequence.rope_offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return `keys` and `values` unchanged, because there are no earlier tokens."""
        return keys, values

    def make_mask(
        self, length: int, *, return_array: bool = False, window_size: int | None = None
    ) -> PackedMask:
        """Return the mask of the packed sequence, which mlx-lm passes on to the attention function.

        Raises:
            TypeError: the model needs the mask as an array, or asks for another length.
        """
        if return_array or length != len(self.sequence):
            raise TypeError("its attention needs the mask as an array")
        return PackedMask(self.sequence, window_size)
