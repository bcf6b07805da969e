"""Runs to the Hub, and adapters from it."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from mlx_dpo.errors import ConfigError, ModelError
from mlx_dpo.policy.adapter_files import CONFIG, WEIGHTS, content_digest, read_adapter
from mlx_dpo.policy.files import read_json
from mlx_dpo.policy.licences import CARD, card_of
from mlx_dpo.policy.peft_layout import WEIGHTS as PEFT_WEIGHTS
from mlx_dpo.policy.target import check_target, partial_folder, writing
from mlx_dpo.publishing import hub
from mlx_dpo.publishing.card import CURVES
from mlx_dpo.runs.cards import steps_of
from mlx_dpo.runs.shipping import open_finished

ALWAYS = (CARD, CONFIG, WEIGHTS)
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
    if missing := [name for name in ALWAYS if not (place / name).is_file()]:
        raise ConfigError(f"{place}: no `{missing[0]}`; make it with `mlx-dpo card {folder}`")
    names = [*ALWAYS, *(name for name in IF_THERE if (place / name).is_file())]
    if "peft_type" not in read_json(place / CONFIG, str(place / CONFIG)):
        names = [name for name in names if name != PEFT_WEIGHTS]  # of another adapter, or half made
    files = {name: _own_file(place, name) for name in names}
    files |= {Path(os.path.normpath(name)).as_posix(): _own_file(place, name) for name in also}
    hub.refuse_leaks(files)
    digest = content_digest(place)[:12]
    steps = steps_of(opened.record)
    return Parcel(files, f"Adapter {digest} of an mlx-dpo run, trained for {steps} steps")


def _own_file(place: Path, name: str) -> Path:
    """A file of the run folder, which is none elsewhere that a link leads to."""
    file = place / name
    if not file.is_file() or not file.resolve().is_relative_to(place.resolve()):
        raise ConfigError(f"{name}: no file of the run folder {place}; nothing else is sent")
    return file


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
    said = card_of(folder).get("base_model")
    entries = read_json(folder / CONFIG, str(folder / CONFIG))
    found = [said[0] if isinstance(said, list) and said else said]
    found.append(entries.get("base_model_name_or_path"))
    return next((name for name in found if name and isinstance(name, str)), None)
