"""Metadata of pairs as arrays: lengths of completions, margins, weights and labels."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_dpo.data.columns import LABELS, LENGTHS, MARGINS_AND_WEIGHTS, column
from mlx_dpo.types import PairMetadata, TokenizedPair


def pair_metadata(pairs: Sequence[TokenizedPair]) -> PairMetadata:
    """Return completion lengths, target margins, weights and labels as arrays. (B,) each

    `pairs` must be all pairs of an optimizer step or of an evaluation, because the result also
    has the mean length of their chosen completions.
    """
    lengths, margins_and_weights = (
        column(pairs, name).astype(np.float32) for name in (LENGTHS, MARGINS_AND_WEIGHTS)
    )
    chosen = mx.array(lengths[:, 1])
    return PairMetadata(
        chosen_tokens=chosen,
        rejected_tokens=mx.array(lengths[:, 2]),
        mean_chosen_tokens=chosen.mean(),
        margins=mx.array(margins_and_weights[:, 0]),
        weights=mx.array(margins_and_weights[:, 1]),
        desirable=mx.array(column(pairs, LABELS) != 0),
    )


def select_metadata(metadata: PairMetadata, indices: mx.array) -> PairMetadata:
    """Return the metadata of the pairs at `indices`, arrays of shape (b,).

    Only the mean length of chosen completions stays that of all pairs.
    """
    selected = {
        name: value if value.ndim == 0 else value[indices]
        for name, value in metadata._asdict().items()
    }
    return PairMetadata(**selected)
