"""Add files in PEFT's format to the folder of a finished run."""

from pathlib import Path

from mlx_dpo.adapters.hf_checkpoint import HFCheckpoint, hub_checkpoint, local_checkpoint
from mlx_dpo.errors import ConfigError, RunError
from mlx_dpo.models.download import is_hub_id
from mlx_dpo.runs.folder import hub_model_id, write_record
from mlx_dpo.runs.save_peft import LOADS_IN_PEFT, write_peft_files
from mlx_dpo.saved_runs.open import OpenRun, load_adapter_into, load_base_of_run, open_run


def export_run(folder: str, base: str | None = None, revision: str | None = None) -> str:
    """Write the adapter of a finished run in PEFT's format into the run folder.

    Return a text that says that PEFT can load the adapter; the run record stores it too.

    Args:
        base: Hugging Face checkpoint that the run's model was made from, as a Hub id or a folder;
            None if the run's model is that checkpoint.
        revision: Hub revision of `base`.

    Raises:
        RunError, ConfigError: the run is unfinished, or a setting has no effect.
        ModelError: a layer has no counterpart in transformers.
    """
    run = open_finished(folder)
    if revision is not None and (base is None or not is_hub_id(base)):
        raise ConfigError("`revision` has no effect without a Hub id for `--base-model`")
    model = load_base_of_run(run)
    load_adapter_into(run, model)
    if base is None:
        checkpoint = local_checkpoint(model.path, model.source)
        source = (hub_model_id(run.record), run.config.revision)
    else:
        checkpoint = find_checkpoint(base, revision)
        source = (base if is_hub_id(base) else None, revision)
    write_peft_files(run.paths.folder, model, run.config, checkpoint, source)
    write_record(run.paths, run.record | {"adapter": LOADS_IN_PEFT})
    return LOADS_IN_PEFT


def open_finished(folder: str) -> OpenRun:
    """Open the folder of a finished run.

    Raises:
        RunError: the run is unfinished, or the folder is not a run folder.
    """
    opened = open_run(folder)
    if not opened.finished:
        raise RunError(
            f"{folder}: the run is unfinished; continue it with `mlx-dpo train --resume --output "
            f"{folder}`"
        )
    return opened


def find_checkpoint(base: str, revision: str | None = None) -> HFCheckpoint:
    """Return the Hugging Face checkpoint that a Hub id or a folder names."""
    if is_hub_id(base):
        return hub_checkpoint(base, revision)
    return local_checkpoint(Path(base).expanduser(), base)
