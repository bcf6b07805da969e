"""One adapter in two layouts, so that its folder loads in mlx-lm and in PEFT."""

from collections.abc import Mapping
from typing import Any

import mlx.nn as nn

from mlx_dpo.arrays import Arrays
from mlx_dpo.policy import peft_layout
from mlx_dpo.publishing.checkpoint import Checkpoint
from mlx_dpo.publishing.counterparts import find_counterparts, refuse_other_weights


def peft_side(
    model: nn.Module,
    entries: Mapping[str, Any],
    checkpoint: Checkpoint,
    *,
    rslora: bool = False,
    base_model: str | None = None,
    revision: str | None = None,
) -> tuple[dict[str, Any], Arrays]:
    """PEFT's settings and arrays of a model's adapters.

    Args:
        entries: Those of the base's `config.json`.
        checkpoint: On which names are proved.
        rslora: Whether the adapters' scale is alpha / sqrt(rank).
        base_model: The checkpoint's Hub id; a folder would mean nothing elsewhere.
        revision: Of the checkpoint on the Hub.

    Raises:
        ModelError: a layer has no counterpart in transformers.
    """
    found = find_counterparts(model, entries, checkpoint)
    refuse_other_weights(model, found, checkpoint)
    settings = peft_layout.config_of(
        model, found.targets, rslora=rslora, transposed=bool(found.turned)
    )
    settings |= {"base_model_name_or_path": base_model, "revision": revision}
    return settings, peft_layout.arrays_of(model, str(entries["model_type"]))
