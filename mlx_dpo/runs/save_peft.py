"""The adapter of a run that ends, made to load in other programs as well."""

from dataclasses import replace
from pathlib import Path

from mlx_dpo.adapters.files import add_peft_files
from mlx_dpo.adapters.hf_checkpoint import HFCheckpoint, local_checkpoint
from mlx_dpo.adapters.hf_names import make_peft_adapter
from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.errors import ModelError
from mlx_dpo.models.download import is_hub_id
from mlx_dpo.models.load import LoadedModel

IN_BOTH = "loads in mlx-lm and in PEFT"


def ship(folder: Path, base: LoadedModel, config: DPOConfig) -> str:
    """Add PEFT's layout to a finished run, if the model's own folder is proof of the names.

    Returns:
        Where the adapter loads, and why not elsewhere.
    """
    try:
        name = base.source if is_hub_id(base.source) else "its base"  # on cards, so no path
        # Names suffice: the model was loaded from these very weights.
        checkpoint = replace(local_checkpoint(base.path, name), folder=None)
        hub_id = config.model if is_hub_id(config.model) else None
        _add(folder, base, config, checkpoint, (hub_id, config.revision))
    except ModelError as error:
        return f"loads in mlx-lm; not in PEFT: {error}"
    return IN_BOTH


def _add(
    folder: Path,
    base: LoadedModel,
    config: DPOConfig,
    checkpoint: HFCheckpoint,
    source: tuple[str | None, str | None],
) -> None:
    """`source` is the checkpoint's Hub id and revision."""
    settings, arrays = make_peft_adapter(
        base.model,
        base.config,
        checkpoint,
        rslora=config.use_rslora and config.start_adapter is None,
        base_model=source[0],
        revision=source[1],
    )
    add_peft_files(folder, settings, arrays)
