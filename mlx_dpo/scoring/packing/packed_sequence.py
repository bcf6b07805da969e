"""Pack all pairs of a batch into one sequence that goes through the model once.

A token's index in the packed sequence differs from its position in its text. mlx-lm's models take
positions and attention mask from their KV cache, so they are given a stand-in for the cache. During
the pass, MLX's attention and RoPE functions are replaced by functions that use the positions and
mask of the packed sequence. If the code of a model computes with token positions, or needs the mask
as an array, an error is raised and another scorer is selected.

The layout of the sequence decides which tokens it has: `shared_prompts` has each prompt once per
pair, `trie` each distinct prefix of all texts once.

Shape letters: T tokens in the packed sequence, m hidden states that go through the head, n
predicted tokens, D width of hidden states, C queries and S keys of a chunk.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
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

ATTENTION_CACHES = (KVCache, RotatingKVCache)  # caches of layers that mix tokens by attention only


class HeadRows(NamedTuple):
    """Tokens of a packed sequence whose hidden states go through the LM head, and their targets.

    The predicted tokens of all completions are those of all chosen, then of all rejected ones.
    """

    indices: mx.array  # (m,) of the tokens that predict
    targets: mx.array  # (m,) predicted token ids
    rows: mx.array | None  # (n,) row of each predicted token; None: the rows are in their order


class PackedSequence(ABC):
    """A packed sequence of pairs: its token ids, positions and attention masks.

    The last token of each completion is left out, because no token follows it.
    """

    HAS_CONSTANT_ARRAYS = True  # its masks need no gradients

    def __init__(self, ids: np.ndarray, positions: np.ndarray) -> None:
        """Store the ids and positions of all tokens, without padding. (T,) each

        Padding is added at the end as a text of its own.
        """
        self.padding = padded_width(len(ids)) - len(ids)
        padding = np.zeros(self.padding, ids.dtype)
        self.tokens = mx.array(np.concatenate([ids, padding]))[None]  # (1, T)
        self.positions = np.concatenate([positions, np.arange(self.padding)])  # (T,)
        self.rope_offset = TokenPositions(self.positions)  # one object, so that layers share it
        self._chunks: dict[Any, list[QueryChunk]] = {}

    def __len__(self) -> int:
        """Return the number of tokens in the packed sequence, including padding at its end."""
        return len(self.positions)

    @abstractmethod
    def head_rows(self) -> HeadRows:
        """Return what the LM head computes for the tokens of all completions."""

    @abstractmethod
    def make_chunks(self, size: int, dtype: mx.Dtype, window: int | None) -> Iterator[QueryChunk]:
        """Yield chunks of up to `size` queries with their masks, which cover all queries in order.

        If `window` is set, a token attends to the last `window` positions of its text only.
        """

    def chunks(self, size: int, dtype: mx.Dtype, window: int | None) -> list[QueryChunk]:
        """Return the chunks of `make_chunks`; all layers with the same `window` use the same."""
        key = size, dtype, window
        if key not in self._chunks:
            self._chunks[key] = list(self.make_chunks(size, dtype, window))
        return self._chunks[key]


def packed_hidden_states(model: nn.Module, parts: ModelParts, sequence: PackedSequence) -> mx.array:
    """Return the hidden states of all tokens of a packed sequence. (T, D)

    The result can be differentiated; gradients include the contribution of the prompts.

    Raises:
        UnsupportedModelError: a layer combines tokens by other means than attention.
    """
    caches = [PackedCache(sequence) for _ in range(count_attention_caches(model))]
    with use_structured_masks(), use_token_positions():
        return parts.hidden_states(sequence.tokens, caches).squeeze(0)


def count_attention_caches(model: nn.Module) -> int:
    """Return the number of KV caches of a model whose layers mix tokens by attention only.

    Raises:
        UnsupportedModelError: a layer combines tokens by other means than attention.
    """
    caches = make_prompt_cache(model)
    if not all(type(cache) in ATTENTION_CACHES for cache in caches):
        raise UnsupportedModelError("layers without attention process tokens one after another")
    return len(caches)


def additive_mask(visible: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """Return numbers to add to the scores of a chunk: 0 if visible, else -inf. (C, S)"""
    return mx.array(np.where(visible, 0.0, -np.inf).astype(np.float32)).astype(dtype)


class PackedMask(StructuredMask):
    """Attention mask of a packed sequence.

    Each token attends to the tokens of its text up to itself. With a sliding window, the token
    attends only to the last `window` of these positions.
    """

    __slots__ = ("sequence", "window")

    def __init__(self, sequence: PackedSequence, window: int | None) -> None:
        """Create the mask of the packed sequence `sequence`.

        Args:
            window: size of the sliding window in positions; None means no window.
        """
        self.sequence, self.window = sequence, window

    def chunks(self, size: int, dtype: mx.Dtype) -> list[QueryChunk]:
        """Return chunks of up to `size` queries with their masks."""
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
