"""Several pairs in one row: each prompt once, both of its completions behind it, no padding.

Where a token lies in such a row is neither its position in its text nor the number of tokens
it sees. Models of mlx-lm ask their cache for both: what they get here says which row it is,
and `mx.fast.rope` and MLX's attention read it from there. A model that computes with
positions by itself, or wants its mask as an array, fails on it, and gets another scorer.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from mlx_dpo.data.batching import padded_width
from mlx_dpo.scoring.backbone import ModelParts, UnsupportedModelError
from mlx_dpo.scoring.kernels.attention import QueryChunk, StructuredMask, use_structured_masks
from mlx_dpo.types import TokenizedPair

ATTENTION_CACHES = (KVCache, RotatingKVCache)  # caches of layers that mix tokens by attention alone


def packed_hidden_states(
    model: nn.Module, halves: ModelParts, pairs: Sequence[TokenizedPair]
) -> mx.array:
    """Hidden states that predict every token of every completion. (n, D)

    In the order of `policy.prefix.predicting_rows`. Gradients flow through the prompts.

    Raises:
        NotSplitError: a layer mixes tokens by other means than attention.
    """
    caches = make_prompt_cache(model)
    if not all(type(cache) in ATTENTION_CACHES for cache in caches):
        raise UnsupportedModelError(
            "layers that are no attention take their tokens one after the other"
        )
    tree = PackedRow(pairs)
    with use_structured_masks(), use_packed_positions():
        hidden = halves.hidden(tree.tokens, [PackedCache(tree) for _ in caches])
    return hidden[0][tree.predicting()]


class PairSpan(NamedTuple):
    """Where a pair lies in the row: from `start`, so many tokens of each part."""

    start: int
    prompt: int
    chosen: int
    rejected: int

    @property
    def end(self) -> int:
        """One past the last token of the pair."""
        return self.start + self.prompt + self.chosen + self.rejected


class PackedRow:
    """A row of pairs. The last token of a completion predicts nothing and stays out."""

    def __init__(self, pairs: Sequence[TokenizedPair]) -> None:
        """Lay `pairs` one behind the other."""
        ids: list[int] = []
        self.spans: list[PairSpan] = []
        for pair in pairs:
            parts = (pair.prompt, pair.chosen[:-1], pair.rejected[:-1])
            self.spans.append(PairSpan(len(ids), *map(len, parts)))
            ids.extend(token for part in parts for token in part)
        padding = padded_width(len(ids)) - len(ids)
        if padding:  # sees itself, and is seen by nothing
            self.spans.append(PairSpan(len(ids), padding, 0, 0))
            ids += padding * [0]
        self.pairs = len(pairs)
        self.tokens = mx.array(ids)[None]  # (1, T)
        self.positions = np.concatenate([_text_positions(span) for span in self.spans])  # (T,)
        self._chunks: dict[Any, list[QueryChunk]] = {}
        self._rotations: dict[Any, tuple[dict[str, Any], Any]] = {}

    def __len__(self) -> int:
        """Tokens in the row."""
        return len(self.positions)

    def predicting(self) -> mx.array:
        """Places that predict: all chosen completions' tokens, then all rejected ones'. (n,)"""
        chosen, rejected = [], []
        for span in self.spans[: self.pairs]:
            last, first = span.start + span.prompt - 1, span.start + span.prompt
            chosen += [last, *range(first, first + span.chosen)]
            rejected += [last, *range(first + span.chosen, span.end)]
        return mx.array(chosen + rejected)

    def chunks(self, size: int, dtype: mx.Dtype, window: int | None) -> list[QueryChunk]:
        """Chunks of queries, none over more than one pair, with what each may not see."""
        key = size, dtype, window
        if key not in self._chunks:
            self._chunks[key] = [
                chunk for span in self.spans for chunk in _query_chunks(span, size, dtype, window)
            ]
        return self._chunks[key]

    def rotation(self, rope: Callable[..., mx.array], dims: int, **how: Any) -> Any:
        """Cosines and signed sines of every token's rotation, from MLX's own. (T, dims) each"""
        key = dims, *((name, id(v) if isinstance(v, mx.array) else v) for name, v in how.items())
        if key not in self._rotations:
            # The arrays are held: another array gets the id of one that is gone.
            self._rotations[key] = how, _rotation_table(rope, dims, self.positions, **how)
        return self._rotations[key][1]


def _text_positions(span: PairSpan) -> np.ndarray:
    """Of a pair's tokens in their texts: both completions follow the prompt."""
    prompt, behind = np.arange(span.prompt), span.prompt
    return np.concatenate(
        [prompt, behind + np.arange(span.chosen), behind + np.arange(span.rejected)]
    )


def _query_chunks(
    span: PairSpan, size: int, dtype: mx.Dtype, window: int | None
) -> Iterator[QueryChunk]:
    at = _text_positions(span)
    part = np.repeat([0, 1, 2], span[1:])
    total = len(at)
    for start in range(0, total, size):
        end = min(start + size, total)
        rows, keys = np.arange(start, end)[:, None], np.arange(end)[None]
        seen = (keys <= rows) & ((part[keys] == 0) | (part[keys] == part[rows]))
        if window is not None:
            seen &= at[rows] - at[keys] < window
        first = int(seen.any(axis=0).argmax())
        hidden = mx.array(np.where(seen[:, first:], 0.0, -np.inf).astype(np.float32))
        here = span.start
        yield QueryChunk(here + start, here + end, here + first, here + end, hidden.astype(dtype))


def _rotation_table(
    rope: Callable[..., mx.array],
    dims: int,
    positions: np.ndarray,
    *,
    traditional: bool,
    **how: Any,
) -> tuple[mx.array, mx.array]:
    """What MLX makes of (1, 0) at every position is (cos, sin), whatever the frequencies."""
    half = mx.arange(dims) % 2 == 0 if traditional else mx.arange(dims) < dims // 2
    ones = mx.broadcast_to(half.astype(mx.float32), (1, 1, int(positions.max()) + 1, dims))
    turned = rope(ones, dims, traditional=traditional, offset=0, **how)[0, 0]
    turned = turned[mx.array(positions)]
    first, second = _rotation_pairs(turned, traditional)
    return _interleave(first, first, traditional), _interleave(-second, second, traditional)


def _rotation_pairs(x: mx.array, traditional: bool) -> tuple[mx.array, mx.array]:
    """The numbers that are turned with each other. (..., D) -> (..., D / 2) each"""
    if traditional:
        return x[..., ::2], x[..., 1::2]
    first, second = mx.split(x, 2, axis=-1)
    return first, second


def _interleave(first: mx.array, second: mx.array, traditional: bool) -> mx.array:
    """`_halves` undone. (..., D)"""
    if traditional:
        return mx.stack([first, second], axis=-1).flatten(-2)
    return mx.concatenate([first, second], axis=-1)


class PackedPositions:
    """What a cache of the row gives as its offset. It can be read, not computed with."""

    __slots__ = ("tree",)

    def __init__(self, tree: PackedRow) -> None:
        """Of `tree`."""
        self.tree = tree


class PackedMask(StructuredMask):
    """Every token sees its own pair's prompt and completion, up to itself."""

    __slots__ = ("tree", "window")

    def __init__(self, tree: PackedRow, window: int | None) -> None:
        """With a window of so many positions, or none."""
        self.tree, self.window = tree, window

    def chunks(self, size: int, dtype: mx.Dtype) -> list[QueryChunk]:
        """As `Tree.chunks`."""
        return self.tree.chunks(size, dtype, self.window)


class PackedCache:
    """A layer's cache: it keeps nothing, for the whole row goes through the layer at once."""

    def __init__(self, tree: PackedRow) -> None:
        """For a row."""
        self.offset = PackedPositions(tree)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """All there is."""
        return keys, values

    def make_mask(
        self, length: int, *, return_array: bool = False, window_size: int | None = None
    ) -> PackedMask:
        """What mlx-lm hands on to the attention."""
        if return_array or length != len(self.offset.tree):
            raise TypeError("its attention wants a mask that is an array")
        return PackedMask(self.offset.tree, window_size)


@contextmanager
def use_packed_positions() -> Iterator[None]:
    """Inside the block `mx.fast.rope` knows the positions of a `Tree`'s tokens."""
    plain: Any = mx.fast.rope

    def rope(x: mx.array, dims: int, *, offset: Any = 0, **how: Any) -> mx.array:
        if not isinstance(offset, PackedPositions):
            return plain(x, dims, offset=offset, **how)
        return _rotate(plain, x, dims, offset.tree, **how)

    fast: Any = mx.fast
    fast.rope = rope
    try:
        yield
    finally:
        fast.rope = plain


def _rotate(
    plain: Callable[..., mx.array], x: mx.array, dims: int, tree: PackedRow, **how: Any
) -> mx.array:
    """Each token turned by its own position. (1, H, T, D) -> (1, H, T, D)"""
    if x.shape[0] != 1 or x.shape[-2] != len(tree):
        raise TypeError("it gives positions to other arrays than its queries and keys")
    cos, sin = tree.rotation(plain, dims, **how)
    part = x[..., :dims].astype(cos.dtype)
    first, second = _rotation_pairs(part, how["traditional"])
    turned = part * cos + _interleave(second, first, how["traditional"]) * sin
    turned = turned.astype(x.dtype)
    return turned if dims == x.shape[-1] else mx.concatenate([turned, x[..., dims:]], axis=-1)
