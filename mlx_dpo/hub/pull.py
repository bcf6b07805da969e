"""Download an adapter from the Hugging Face Hub."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from mlx_dpo.adapters.adapter_files import CONFIG, read_adapter
from mlx_dpo.errors import ModelError
from mlx_dpo.hub.errors import as_model_errors
from mlx_dpo.hub.push import ADAPTER_FILES
from mlx_dpo.models.files import read_json
from mlx_dpo.models.license import read_card_metadata
from mlx_dpo.models.output_folder import check_output_folder, disk_errors, new_output_folder
from mlx_dpo.phases import paused, phase


@dataclass(frozen=True)
class PulledAdapter:
    """An adapter that was downloaded from the Hub into a folder."""

    folder: Path
    base_model: str | None
    size_bytes: int


def pull_adapter(name: str, output: Path, revision: str | None = None) -> PulledAdapter:
    """Download an adapter into the folder `output`, completely or not at all.

    Raises:
        ModelError: the Hub has no adapter of this name, the adapter is damaged, or `output` cannot
            be written.
    """
    check_output_folder(output, 0)
    snapshot = _download(name, revision)
    try:
        read_adapter(snapshot)
    except ModelError as error:  # names the file in the Hub's cache
        raise ModelError(str(error).replace(str(snapshot), name)) from error
    check_output_folder(output, sum(file.stat().st_size for file in snapshot.iterdir()))
    with new_output_folder(output) as partial, disk_errors(output):
        for file in ADAPTER_FILES:
            if (snapshot / file).is_file():
                shutil.copyfile(snapshot / file, partial / file)
    size = sum(file.stat().st_size for file in output.iterdir())
    return PulledAdapter(output, _base_model(snapshot), size)


def _download(name: str, revision: str | None) -> Path:
    """Download the files of an adapter into the Hub's cache; return the folder they are in."""
    with as_model_errors(name):
        # By commit: given a branch, an unreachable Hub would silently mean an older cached copy.
        commit = HfApi().model_info(name, revision=revision).sha
        with phase(f"Downloading {name}"), paused():  # the library shows progress bars itself
            snapshot = snapshot_download(name, revision=commit, allow_patterns=list(ADAPTER_FILES))
    folder = Path(snapshot)
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{name}: not an adapter (there is no `{CONFIG}`)")
    return folder


def _base_model(folder: Path) -> str | None:
    """Return the base model that the model card, else the adapter's config, names; or None."""
    from_card = read_card_metadata(folder).get("base_model")
    entries = read_json(folder / CONFIG, str(folder / CONFIG))
    names = [from_card[0] if isinstance(from_card, list) and from_card else from_card]
    names.append(entries.get("base_model_name_or_path"))
    return next((name for name in names if name and isinstance(name, str)), None)
