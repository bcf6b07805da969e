"""A finished or unfinished run, or a plain model, opened to be used."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_dpo.config import DPOConfig
from mlx_dpo.errors import ConfigError, RunError
from mlx_dpo.policy import adapters
from mlx_dpo.policy.adapter_files import content_digest, load_adapter
from mlx_dpo.policy.load import Base, fingerprint, load_base, tokenizer_fingerprint
from mlx_dpo.runs.inputs import read_base
from mlx_dpo.runs.paths import RunPaths, known_run
from mlx_dpo.runs.record import check_contents
from mlx_dpo.training import checkpoint

FOLDERS = {  # settings that may name a folder, and where the record says how it is found
    "model": "model_folder",
    "start_adapter": "start_folder",
    "reference_model": "reference_folder",
}


@dataclass(frozen=True)
class Opened:
    """A run folder: what it trained, and where its newest adapters lie."""

    paths: RunPaths
    record: dict[str, Any]
    config: DPOConfig  # with the model's folder as it is found from here
    adapter: Path  # the run folder, or its last checkpoint

    @property
    def trained_on_text(self) -> bool:
        """Whether the pairs were plain text, so that the policy knows no chat template."""
        return not any(report["as_chat"] for report in self.record["pairs"])

    @property
    def finished(self) -> bool:
        """Whether the adapters are those of the whole run."""
        return self.adapter == self.paths.folder


def open_run(folder: str) -> Opened:
    """Find the record and the newest adapters of a run.

    Raises:
        RunError: the folder is no run folder, or holds no adapters yet.
    """
    paths, record = known_run(folder)
    adapter = paths.folder
    if record["state"] != "finished":
        last = checkpoint.latest(paths.checkpoints)
        if last is None:
            raise RunError(
                f"{folder}: the run has no checkpoint yet; go on with `mlx-dpo train --resume "
                f"--output {folder}`"
            )
        adapter = last
    settings = record["settings"] | record.get("settled", {})
    for name, recorded in FOLDERS.items():
        if record.get(recorded):
            nearby = os.path.normpath(paths.folder / record[recorded])
            settings[name] = nearby if os.path.isdir(nearby) else settings[name]
    return Opened(paths, record, DPOConfig.from_dict(settings), adapter)


def load_policy(run: str | None, *, model: str | None = None, reference: bool = False) -> Base:
    """The policy of a run, its reference (the policy as it started), or a plain model.

    Raises:
        RunError: the model is no longer the one that was trained on.
        ConfigError: neither or both of `run` and `model` are given, or a plain model is
            asked for its reference.
    """
    if (run is None) == (model is None):
        raise ConfigError("name a run folder or a --model, and only one of them")
    if model is not None:
        if reference:
            raise ConfigError("`--reference` has no effect with `--model`: there are no adapters")
        return load_base(model)
    assert run is not None
    opened = open_run(run)
    base = base_of(opened)
    if reference:
        put_reference(opened, base)
        return base
    put_policy(opened, base)
    return base if opened.finished else replace(base, notes=(*base.notes, unfinished(opened)))


def base_of(opened: Opened) -> Base:
    """The model that the run was trained on, as it is loaded.

    Raises:
        RunError: it is no longer what it was.
    """
    base = read_base(opened.config)
    check_contents(
        opened.paths,
        opened.record,
        {"model": fingerprint(base.path), "tokenizer": tokenizer_fingerprint(base.path)},
    )
    return base


def unfinished(opened: Opened) -> str:
    """What to say of a run that has not come to its end."""
    return f"the run is unfinished; these are its adapters of {opened.adapter.name}"


def put_reference(opened: Opened, base: Base) -> None:
    """Make `base`, as it was loaded, the policy that the run started from.

    Raises:
        RunError: the adapter that it started from is gone, or another one.
    """
    if opened.config.start_adapter is None:
        return
    folder = Path(opened.config.start_adapter)
    if not folder.is_dir():
        raise RunError(
            f"{opened.paths.folder}: its reference is the model with the adapter of {folder}, "
            "which is gone; put it back there"
        )
    check_contents(opened.paths, opened.record, {"start": content_digest(folder)})
    load_adapter(base.model, folder)


def put_policy(opened: Opened, base: Base) -> None:
    """Make `base`, or the reference that it was made, the policy of the run."""
    adapters.detach(base.model)
    load_adapter(base.model, opened.adapter)
