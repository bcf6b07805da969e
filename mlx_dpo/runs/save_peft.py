"""Save the adapter of a finished run in the file layout of PEFT, in addition to mlx-lm's."""

from dataclasses import replace
from pathlib import Path

from mlx_dpo.adapters.adapter_files import add_peft_files
from mlx_dpo.adapters.hf_checkpoint import HFCheckpoint, local_checkpoint
from mlx_dpo.adapters.hf_names import make_peft_adapter
from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.errors import ModelError
from mlx_dpo.models.download import is_hub_id
from mlx_dpo.models.load import LoadedModel

LOADS_IN_PEFT = "loads in mlx-lm and in PEFT"


def save_peft(folder: Path, base: LoadedModel, config: DPOConfig) -> str:
    """Add PEFT's files to a finished run, if the layer names match the Hugging Face checkpoint.

    Returns:
        Text that names the libraries that can load the adapter, with the reason if PEFT cannot.
    """
    try:
        name = base.source if is_hub_id(base.source) else "its base"  # on cards: no path
        # Names suffice: the model was loaded from these very weights.
        checkpoint = replace(local_checkpoint(base.path, name), folder=None)
        hub_id = config.model if is_hub_id(config.model) else None
        write_peft_files(folder, base, config, checkpoint, (hub_id, config.revision))
    except ModelError as error:
        return f"loads in mlx-lm; not in PEFT: {error}"
    return LOADS_IN_PEFT


def write_peft_files(
    folder: Path,
    base: LoadedModel,
    config: DPOConfig,
    checkpoint: HFCheckpoint,
    source: tuple[str | None, str | None],
) -> None:
    """Write the adapter of `base` to `folder` in PEFT's layout.

    Args:
        folder: run folder.
        base: model with the adapter attached.
        config: settings of the run.
        checkpoint: the Hugging Face checkpoint from which the model was converted.
        source: Hub id and revision of that checkpoint, for PEFT's settings.
    """
    settings, arrays = make_peft_adapter(
        base.model,
        base.config,
        checkpoint,
        rslora=config.use_rslora and config.start_adapter is None,
        base_model=source[0],
        revision=source[1],
    )
    add_peft_files(folder, settings, arrays)
