"""Rotary position embeddings with one position per token, for packed sequences.

`mx.fast.rope` rotates consecutive tokens, starting from one offset per sequence. In a packed
sequence positions restart, because both completions of a pair follow the same prompt. On a GPU the
tokens are therefore passed to it as sequences of one token, each with its own offset: one kernel.
The CPU, where MLX would compute the cosines and sines again in each layer, uses a table of them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dpo.models.device import is_cpu
from mlx_dpo.models.restore import patched

Rope = Callable[..., mx.array]  # signature of `mx.fast.rope`


class TokenPositions:
    """Position of every token of a packed sequence, instead of the KV cache's single `offset`.

    The class deliberately supports no arithmetic. A model that computes with the offset itself
    therefore fails, instead of computing wrong positions.
    """

    __slots__ = ("_tables", "offsets", "positions")

    def __init__(self, positions: np.ndarray) -> None:
        """Store the `positions`, one per token. (T,)"""
        self.positions = positions
        self.offsets = mx.array(positions.astype(np.int32))
        self._tables: dict[Any, tuple[dict[str, Any], Any]] = {}

    def rotation_table(self, rope: Rope, dims: int, **options: Any) -> tuple[mx.array, mx.array]:
        """Return the cosines and signed sines of every token's rotation. (T, dims) each

        The result is cached, because all layers with the same `options` use it.
        """
        values = ((k, id(v) if isinstance(v, mx.array) else v) for k, v in options.items())
        key = dims, *values
        if key not in self._tables:
            # Storing the options keeps their arrays alive, so that no other array gets the id.
            self._tables[key] = options, _rotation_table(rope, dims, self.positions, **options)
        table: tuple[mx.array, mx.array] = self._tables[key][1]
        return table


@contextmanager
def use_token_positions() -> Iterator[None]:
    """Make `mx.fast.rope` accept `TokenPositions` as its `offset` inside the block."""
    with patched(mx.fast, "rope", partial(_rope, mx.fast.rope)):
        yield


def _rope(original: Rope, x: mx.array, dims: int, *, offset: Any = 0, **options: Any) -> mx.array:
    """Rotate `x` like `mx.fast.rope`; `offset` may hold one position per token."""
    if isinstance(offset, TokenPositions):
        return _rotate(original, x, dims, offset, **options)
    return original(x, dims, offset=offset, **options)


def _rotate(
    rope: Rope, x: mx.array, dims: int, positions: TokenPositions, **options: Any
) -> mx.array:
    """Rotate each token of the queries or keys by its own position. (1, H, T, D) -> (1, H, T, D)

    A pair (a, b) of numbers becomes (a cos - b sin, b cos + a sin). Only the first `dims` numbers
    of a head are rotated.

    Raises:
        TypeError: `x` does not hold one packed sequence of the length of `positions`.
    """
    if x.shape[0] != 1 or x.shape[-2] != len(positions.positions):
        raise TypeError("it applies positions to arrays other than queries and keys")
    if not is_cpu():
        by_token = x.transpose(2, 1, 0, 3)  # (T, H, 1, D)
        return rope(by_token, dims, offset=positions.offsets, **options).transpose(2, 1, 0, 3)
    cos, signed_sin = positions.rotation_table(rope, dims, **options)  # (T, dims) each
    rotary = x[..., :dims].astype(cos.dtype)
    first, second = _split_pairs(rotary, options["traditional"])
    swapped = _join_pairs(second, first, options["traditional"])
    rotated = (rotary * cos + swapped * signed_sin).astype(x.dtype)
    return rotated if dims == x.shape[-1] else mx.concatenate([rotated, x[..., dims:]], axis=-1)


def _rotation_table(
    rope: Rope, dims: int, positions: np.ndarray, *, traditional: bool, **options: Any
) -> tuple[mx.array, mx.array]:
    """Return the cosines and signed sines of the rotation at every position. (T, dims) each

    The MLX function `rope` rotates (1, 0) to (cos, sin). Reading cosines and sines off its output
    covers every kind of frequencies and scaling without repeating their formulas.
    """
    first_of_pair = mx.arange(dims) % 2 == 0 if traditional else mx.arange(dims) < dims // 2
    length = int(positions.max()) + 1
    ones = mx.broadcast_to(first_of_pair.astype(mx.float32), (1, 1, length, dims))
    rotated = rope(ones, dims, traditional=traditional, offset=0, **options)[0, 0]
    cos, sin = _split_pairs(rotated[mx.array(positions)], traditional)  # (T, dims / 2) each
    return _join_pairs(cos, cos, traditional), _join_pairs(-sin, sin, traditional)


def _split_pairs(x: mx.array, traditional: bool) -> tuple[mx.array, mx.array]:
    """Return the first and the second number of each pair to rotate. (..., D) -> (..., D / 2) each

    Traditional RoPE pairs neighboring numbers; otherwise number i is paired with number i + D / 2.
    """
    if traditional:
        return x[..., ::2], x[..., 1::2]
    first, second = mx.split(x, 2, axis=-1)
    return first, second


def _join_pairs(first: mx.array, second: mx.array, traditional: bool) -> mx.array:
    """Undo `_split_pairs`: put first and second numbers back in place. (..., D / 2) -> (..., D)"""
    if traditional:
        return mx.stack([first, second], axis=-1).flatten(-2)
    return mx.concatenate([first, second], axis=-1)
