"""Runs to the Hub, and adapters from it."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from mlx_dpo.errors import ConfigError, ModelError
from mlx_dpo.policy.adapter_files import CONFIG, WEIGHTS, content_digest, read_adapter
from mlx_dpo.policy.files import read_json
from mlx_dpo.policy.peft_layout import WEIGHTS as PEFT_WEIGHTS
from mlx_dpo.policy.target import check_target, partial_folder, writing
from mlx_dpo.publishing import hub
from mlx_dpo.publishing.card import CURVES
from mlx_dpo.runs.cards import README
from mlx_dpo.runs.shipping import open_finished

ALWAYS = (README, CONFIG, WEIGHTS)
IF_THERE = (PEFT_WEIGHTS, CURVES)


@dataclass(frozen=True)
class Parcel:
    """What of a run is going to be sent, and the message that goes with it."""

    files: dict[str, Path]
    message: str


def pack(folder: str, also: tuple[str, ...] = ()) -> Parcel:
    """The files of a finished run that go to the Hub: its adapter, its card, and those that are
    named; never pairs, checkpoints or logs by themselves.

    Raises:
        RunError: the run is unfinished.
        ConfigError: a named file is not in the run folder, or something must not leave the machine.
    """
    opened = open_finished(folder)
    place = opened.paths.folder
    names = [*ALWAYS, *(name for name in IF_THERE if (place / name).is_file())]
    for name in also:
        inside = (place / name).resolve().is_relative_to(place.resolve())
        if not inside or not (place / name).is_file():
            raise ConfigError(f"`--also` {name}: no file of the run folder {folder}")
        names.append(Path(name).as_posix())
    if missing := [name for name in ALWAYS if not (place / name).is_file()]:
        raise ConfigError(f"{place}: no `{missing[0]}`; make it with `mlx-dpo card {folder}`")
    files = {name: place / name for name in dict.fromkeys(names)}
    hub.refuse_leaks(files)
    digest = content_digest(place)[:12]
    return Parcel(files, f"Adapter {digest} of an mlx-dpo run of {opened.record['steps']} steps")


@dataclass(frozen=True)
class Pulled:
    """An adapter from the Hub."""

    folder: Path
    base_model: str | None
    bytes: int


def pull_adapter(name: str, output: Path, revision: str | None = None) -> Pulled:
    """Bring an adapter to the folder `output`, which appears whole or not at all.

    Raises:
        ModelError: there is none, it cannot be read here, or it cannot be written.
    """
    check_target(output, 0)
    found = hub.pull(name, revision=revision)
    try:
        read_adapter(found)
    except ModelError as error:  # says where the Hub's copy lies
        raise ModelError(str(error).replace(str(found), name)) from error
    check_target(output, sum(file.stat().st_size for file in found.iterdir()))
    with partial_folder(output) as partial, writing(output):
        partial.mkdir()
        for file in hub.ADAPTER_FILES:
            if (found / file).is_file():
                shutil.copyfile(found / file, partial / file)
    size = sum(file.stat().st_size for file in output.iterdir())
    return Pulled(output, _base_of(found), size)


def _base_of(folder: Path) -> str | None:
    """The model that an adapter is for, as its card or else its settings say."""
    from huggingface_hub import ModelCard

    page = folder / README
    said = (
        ModelCard.load(page, ignore_metadata_errors=True).data.base_model
        if page.is_file()
        else None
    )
    if isinstance(said, list):
        said = said[0] if said else None
    entries = read_json(folder / CONFIG, str(folder / CONFIG))
    named = said or entries.get("base_model_name_or_path")
    return str(named) if named else None
