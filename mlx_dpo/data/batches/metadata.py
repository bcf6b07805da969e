"""Metadata of pairs as arrays: lengths of completions, margins, weights, labels and lists."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dpo.data.columns import GAPS, LABELS, LENGTHS, MARGINS_AND_WEIGHTS, RANKINGS, column
from mlx_dpo.types import PairMetadata, TokenizedPair


def pair_metadata(pairs: Sequence[TokenizedPair]) -> PairMetadata:
    """Return completion lengths, target margins, weights, labels and lists as arrays. (B, …) each

    `pairs` must be all pairs of an optimizer step or of an evaluation, because the result also
    has the mean length of their chosen completions.
    """
    lengths, margins_and_weights = (
        column(pairs, name).astype(np.float32) for name in (LENGTHS, MARGINS_AND_WEIGHTS)
    )
    rankings = column(pairs, RANKINGS)
    places, scores, span = rankings[:, 1:3], rankings[:, 3:5], rankings[:, 5]
    chosen = mx.array(lengths[:, 1] - column(pairs, GAPS)[:, 1].astype(np.float32))
    return PairMetadata(
        chosen_tokens=chosen,
        rejected_tokens=mx.array(lengths[:, 2]),
        mean_chosen_tokens=chosen.mean(),
        margins=mx.array(margins_and_weights[:, 0]),
        weights=mx.array(margins_and_weights[:, 1]),
        desirable=mx.array(column(pairs, LABELS) != 0),
        lists=mx.array(list_indices(rankings)),
        places=mx.array(places.astype(np.int32)),
        scores=mx.array(scores.astype(np.float32)),
        best_worst=mx.array((rankings[:, 6] > 1) & (scores[:, 0] - scores[:, 1] == span)),
    )


def list_indices(rankings: Any) -> Any:
    """Return the index of each pair's list among the lists of `rankings`, from 0. (B, 7) -> (B,)

    A plain pair is a list of its own. A list that occurs twice, because of `mix` or of equal rows,
    is two lists: the second pair of the same two completions begins another one.
    """
    count = len(rankings)
    if not rankings[:, 6].any():
        return np.arange(count, dtype=np.int32)
    seen: Counter[Any] = Counter()
    found: dict[Any, int] = {}
    indices = np.empty(count, np.int32)
    for i, (list_id, chosen, rejected, *_, num_pairs) in enumerate(rankings.tolist()):
        key: Any = (list_id, chosen, rejected) if num_pairs else i
        name = (list_id, seen[key]) if num_pairs else i
        seen[key] += 1
        indices[i] = found.setdefault(name, len(found))
    return indices


def select_metadata(metadata: PairMetadata, indices: mx.array) -> PairMetadata:
    """Return the metadata of the pairs at `indices`, arrays of shape (b,).

    Only the mean length of chosen completions stays that of all pairs.
    """
    selected = {
        name: value if value.ndim == 0 else value[indices]
        for name, value in metadata._asdict().items()
    }
    return PairMetadata(**selected)
