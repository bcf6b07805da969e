"""Padded token rows of pairs, as arrays."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_dpo.data.batches.padding import PAD_MULTIPLE
from mlx_dpo.data.batches.token_counts import row_width
from mlx_dpo.types import PairBatch, TokenizedPair, lack_rejected


def collate(pairs: Sequence[TokenizedPair], *, pad_multiple: int = PAD_MULTIPLE) -> PairBatch:
    """Collate pairs into a right-padded batch: all chosen, then all rejected sequences. (2B, T)

    A sequence is a prompt and one completion. The width T is `padded_width` of the longest
    sequence, rounded up to a multiple of `pad_multiple`. Pairs without rejected completions give
    chosen sequences only. (B, T)
    """
    rows = [(pair.prompt, pair.chosen) for pair in pairs]
    if not lack_rejected(pairs):
        rows += [(pair.prompt, pair.rejected) for pair in pairs]
    width = row_width(pairs, pad_multiple)

    # The padding token does not matter: it comes after all scored tokens.
    tokens = np.zeros((len(rows), width), np.int32)
    mask = np.zeros((len(rows), width), np.bool_)
    for row, (prompt, completion) in enumerate(rows):
        start, end = len(prompt), len(prompt) + len(completion)
        tokens[row, :end] = prompt + completion
        mask[row, start:end] = True
    for row, pair in enumerate(pairs):
        for start, end in pair.gaps:
            mask[row, len(pair.prompt) + start : len(pair.prompt) + end] = False
    return PairBatch(mx.array(tokens), mx.array(mask))
