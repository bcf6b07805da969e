"""What the reference says of a run's pairs, out of the cache that runs share."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import mlx.nn as nn

from mlx_dpo import paths as places
from mlx_dpo.policy.scoring import Score
from mlx_dpo.runs.record import reference_provenance
from mlx_dpo.training.cache import labels
from mlx_dpo.training.reference import reference_logps
from mlx_dpo.types import PairLogps, TokenizedPair


def ask_reference(
    model: nn.Module,
    pairs: Sequence[TokenizedPair],
    record: dict[str, Any],
    *,
    held: str,
    score: Score,
    progress: Callable[[int], None] = lambda scored: None,
) -> PairLogps:
    """Log-probabilities under the adapter-off base of the run of `record`. (len(pairs),) each

    `held` says on what device and in what number type it is asked now.
    """
    return reference_logps(
        model,
        pairs,
        provenance=reference_provenance(record, held),
        cache=places.reference_cache(),
        score=score,
        labels=labels(_name(record), held),
        progress=progress,
    )


def _name(record: dict[str, Any]) -> str:
    """The model as it was named; of a folder, not the way to it."""
    model: str = record["settings"]["model"]
    local = record.get("model_folder") is not None
    return os.path.basename(os.path.abspath(os.path.expanduser(model))) if local else model
