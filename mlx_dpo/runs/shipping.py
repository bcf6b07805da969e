"""The adapter of a run, made to load in other programs as well."""

from dataclasses import replace
from pathlib import Path

from mlx_dpo.config import DPOConfig
from mlx_dpo.errors import ConfigError, ModelError, RunError
from mlx_dpo.policy.adapter_files import add_peft
from mlx_dpo.policy.load import Base
from mlx_dpo.policy.source import is_hub_id
from mlx_dpo.publishing.checkpoint import Checkpoint, hub_checkpoint, local_checkpoint
from mlx_dpo.publishing.layouts import peft_side
from mlx_dpo.runs.paths import write_record
from mlx_dpo.runs.policies import Opened, base_of, open_run, put_policy
from mlx_dpo.runs.record import hub_model

IN_BOTH = "loads in mlx-lm and in PEFT"


def ship(folder: Path, base: Base, config: DPOConfig) -> str:
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


def export_run(folder: str, base: str | None = None, revision: str | None = None) -> str:
    """Add PEFT's layout to the folder of a finished run; `base` is the Hugging Face checkpoint,
    a Hub id or a folder, that the run's model was made from.

    Raises:
        RunError, ConfigError: the run is unfinished, or a setting has no effect.
        ModelError: a layer has no counterpart in transformers.
    """
    opened = open_finished(folder)
    if revision is not None and (base is None or not is_hub_id(base)):
        raise ConfigError("`revision` has no effect without a Hub id for `--base`")
    model = base_of(opened)
    put_policy(opened, model)
    if base is None:
        checkpoint = local_checkpoint(model.path, model.source)
        source = (hub_id_of(opened), opened.config.revision)
    else:
        checkpoint = find_checkpoint(base, revision)
        source = (base if is_hub_id(base) else None, revision)
    _add(opened.paths.folder, model, opened.config, checkpoint, source)
    write_record(opened.paths, opened.record | {"adapter": IN_BOTH})
    return IN_BOTH


def open_finished(folder: str) -> Opened:
    """A run whose adapters are those of its end.

    Raises:
        RunError: it is unfinished, or no run.
    """
    opened = open_run(folder)
    if not opened.finished:
        raise RunError(
            f"{folder}: the run is unfinished; go on with `mlx-dpo train --resume --output "
            f"{folder}`"
        )
    return opened


def find_checkpoint(base: str, revision: str | None = None) -> Checkpoint:
    """The Hugging Face checkpoint that a person names."""
    if is_hub_id(base):
        return hub_checkpoint(base, revision)
    return local_checkpoint(Path(base).expanduser(), base)


def hub_id_of(opened: Opened) -> str | None:
    """The Hub id of the model that a run was trained on; None for a folder, whose path would
    mean nothing elsewhere.
    """
    return hub_model(opened.record)


def _add(
    folder: Path,
    base: Base,
    config: DPOConfig,
    checkpoint: Checkpoint,
    source: tuple[str | None, str | None],
) -> None:
    """`source` is the checkpoint's Hub id and revision."""
    settings, arrays = peft_side(
        base.model,
        base.config,
        checkpoint,
        rslora=config.use_rslora and config.start_adapter is None,
        base_model=source[0],
        revision=source[1],
    )
    add_peft(folder, settings, arrays)
