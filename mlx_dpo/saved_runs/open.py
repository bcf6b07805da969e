"""Open run folders, and load the models and adapters of runs, or a model without a run."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_dpo.adapters import attach as adapters
from mlx_dpo.adapters.adapter_files import adapter_digest, load_adapter
from mlx_dpo.adapters.switch import AdapterState, AdapterSwitch
from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.data.chat_templates.template_date import set_day
from mlx_dpo.errors import ConfigError, RunError
from mlx_dpo.io.arrays import named_arrays
from mlx_dpo.models.files import model_fingerprint, tokenizer_fingerprint
from mlx_dpo.models.load import LoadedModel, load_model
from mlx_dpo.runs.folder import RunPaths, check_provenance, recorded_day
from mlx_dpo.runs.inputs import load_configured_base
from mlx_dpo.runs.stages.find import find_run
from mlx_dpo.training import checkpoint
from mlx_dpo.units import format_bytes

FOLDERS = {  # settings that may name a folder, and where the record says how it is found
    "model": "model_folder",
    "start_adapter": "start_folder",
    "reference_model": "reference_folder",
}


@dataclass(frozen=True)
class OpenRun:
    """A run folder with its record `run.json`, its settings and its newest adapters."""

    paths: RunPaths
    record: dict[str, Any]
    config: DPOConfig  # with the model's folder relative to the current one
    adapter: Path  # the run folder, or its last checkpoint

    @property
    def trained_on_text(self) -> bool:
        """Whether the run was trained on plain text, without a chat template."""
        return not any(report["as_chat"] for report in self.record["pairs"])

    @property
    def day(self) -> date | None:
        """Day that the chat template prints in everything that is measured of this run."""
        return recorded_day(self.record)

    @property
    def finished(self) -> bool:
        """Whether the run is finished, so that its newest adapters are in the run folder itself."""
        return self.adapter == self.paths.folder


def open_run(folder: str) -> OpenRun:
    """Open a run folder with its newest adapters: the final ones, or those of the last checkpoint.

    Raises:
        RunError: the folder is not a run folder, or has no adapters yet.
    """
    paths, record = find_run(folder)
    adapter = paths.folder
    if record["state"] != "finished":
        last = checkpoint.latest(paths.checkpoints)
        if last is None:
            raise RunError(
                f"{folder}: the run has no checkpoint yet; continue it with "
                "`mlx-dpo train --resume "
                f"--output {folder}`"
            )
        adapter = last
    settings = record["settings"] | record.get("automatic_settings", {})
    for name, recorded in FOLDERS.items():
        if record.get(recorded):
            nearby = os.path.normpath(paths.folder / record[recorded])
            settings[name] = nearby if os.path.isdir(nearby) else settings[name]
    return OpenRun(paths, record, DPOConfig.from_dict(settings), adapter)


def _check_run_or_model(run: str | None, model: str | None) -> None:
    """Raise `ConfigError` if neither or both of a run and a model are given."""
    if run is None and model is None:
        raise ConfigError("missing RUN (a run folder) or --model")
    if run is not None and model is not None:
        raise ConfigError("name RUN (a run folder) or --model, not both")


def load_policy(
    run: str | None, *, model: str | None = None, reference: bool = False
) -> LoadedModel:
    """Load a run's trained policy, a run's reference model, or a model without a run.

    Raises:
        RunError: the model is no longer the one that was trained on.
        ConfigError: neither or both of `run` and `model` are given, or a plain model is
            asked for its reference.
    """
    _check_run_or_model(run, model)
    if model is not None:
        if reference:
            raise ConfigError("`reference` has no effect with `model`: no adapter is loaded")
        return load_model(model)
    assert run is not None
    opened = open_run(run)
    base = load_base_of_run(opened)
    if reference:
        load_reference_into(opened, base)
        return base
    load_adapter_into(opened, base)
    return base if opened.finished else replace(base, notes=(*base.notes, unfinished_note(opened)))


def load_base_of_run(opened: OpenRun) -> LoadedModel:
    """Load the base model of the run, without adapters.

    Raises:
        RunError: the model or its tokenizer has changed since the run.
    """
    base = load_configured_base(opened.config)
    set_day(base.tokenizer, opened.day)
    check_provenance(
        opened.paths,
        opened.record,
        {"model": model_fingerprint(base.path), "tokenizer": tokenizer_fingerprint(base.path)},
    )
    return base


def unfinished_note(opened: OpenRun) -> str:
    """Return a note for the user: the run is unfinished, and which checkpoint is used instead."""
    return f"the run is unfinished; its adapter is that of {opened.adapter.name}"


def load_reference_into(opened: OpenRun, base: LoadedModel) -> None:
    """Attach the adapter that the run started from, if there is one, to the freshly loaded `base`.

    Raises:
        RunError: the start adapter is gone or has changed since the run.
    """
    if opened.config.start_adapter is None:
        return
    folder = Path(opened.config.start_adapter)
    if not folder.is_dir():
        raise RunError(
            f"{opened.paths.folder}: its reference is the model with the adapter of {folder}, "
            "which does not exist; restore it there"
        )
    check_provenance(opened.paths, opened.record, {"start_adapter": adapter_digest(folder)})
    load_adapter(base.model, folder)


def load_synced_reference_into(opened: OpenRun, base: LoadedModel) -> bool:
    """Load the reference of a run whose reference followed the policy (`sync_ref_model`).

    Returns:
        Whether there is such a reference; if not, `base` is unchanged.

    Raises:
        RunError: the weights of the reference are missing.
    """
    synced = checkpoint.synced_reference_weights(opened.paths.checkpoints)
    if synced is None:
        if opened.config.sync_ref_model and opened.finished:  # a run without a move is refused
            raise RunError(
                f"{opened.paths.checkpoints}: the reference was updated during training, and its "
                "weights are missing with the checkpoints; restore them"
            )
        return False
    load_adapter_into(opened, base)
    types = {name: value.dtype for name, value in named_arrays(base.model.parameters()).items()}
    weights = [(name, value.astype(types[name])) for name, value in synced.items()]
    base.model.load_weights(weights, strict=False)
    return True


def load_adapter_into(opened: OpenRun, base: LoadedModel) -> None:
    """Replace the adapters of `base` by the newest adapters of the run."""
    adapters.detach_adapters(base.model)
    load_adapter(base.model, opened.adapter)


@dataclass(frozen=True)
class SwitchableModel:
    """A model whose adapters can be switched on (aligned) and off (base)."""

    base: LoadedModel
    switch: AdapterSwitch
    run: OpenRun | None  # None for a model that is not from a run
    adapter: Path | None  # the folder of the adapter
    notes: tuple[str, ...]

    def provenance(self, state: AdapterState) -> dict[str, Any]:
        """Return names and digests of the model and of the adapter in use, if any, in `state`."""
        start = self.run.config.start_adapter if self.run else None
        folder = self.adapter if state == "aligned" else start
        provenance: dict[str, Any] = {"model": self.base.source, "side": state}
        provenance["model_digest"] = self._model_digest
        if self.run is not None:
            provenance["run"] = str(self.run.paths.folder)
        if folder is not None:
            provenance["adapter_digest"] = adapter_digest(Path(folder))
        return provenance

    @cached_property
    def _model_digest(self) -> str:
        if self.run is None:
            return model_fingerprint(self.base.path)  # reads all of its weights
        return str(self.run.record["provenance"]["model"])


def open_switchable(
    run: str | None,
    *,
    model: str | None = None,
    adapter: str | None = None,
    wanted: Sequence[AdapterState] = ("base", "aligned"),
) -> SwitchableModel:
    """Load a model that can be switched between base (adapters off) and aligned (on).

    Only the states in `wanted` (`base`, `aligned`) are loaded; the last one that exists is active.

    Raises:
        RunError: the model is no longer the one that was trained on.
        ConfigError: neither or both of `run` and `model` are given, or an argument has no effect.
        ModelError: the model or the adapter cannot be read.
    """
    _check_run_or_model(run, model)
    if run is not None:
        if adapter is not None:
            raise ConfigError("`--adapter` has no effect with a run, which has its own adapter")
        return _switchable_run(open_run(run), wanted)
    assert model is not None
    if adapter is None and "aligned" not in wanted:
        raise ConfigError(
            "`--base` has no effect without a run or an --adapter: --model alone is the base"
        )
    folder = None if adapter is None else Path(adapter).expanduser()
    return _switchable_model(load_model(model), folder, wanted)


def _switchable_model(
    base: LoadedModel, adapter: Path | None, wanted: Sequence[AdapterState]
) -> SwitchableModel:
    switch = AdapterSwitch(base.model)
    if adapter is None or "base" in wanted:
        switch.save_state("base")
    if adapter is not None and "aligned" in wanted:
        load_adapter(base.model, adapter)
        switch.save_state("aligned")
    return SwitchableModel(base, switch, None, adapter, (*base.notes, *_memory_notes(switch)))


def _switchable_run(opened: OpenRun, wanted: Sequence[AdapterState]) -> SwitchableModel:
    base = load_base_of_run(opened)
    switch = AdapterSwitch(base.model)
    load_reference_into(opened, base)
    if "base" in wanted:
        switch.save_state("base")
    notes = [*base.notes]
    if "aligned" in wanted:
        load_adapter_into(opened, base)
        switch.save_state("aligned")
        notes += [] if opened.finished else [unfinished_note(opened)]
    return SwitchableModel(base, switch, opened, opened.adapter, (*notes, *_memory_notes(switch)))


def _memory_notes(switch: AdapterSwitch) -> list[str]:
    if not (size := switch.duplicated_bytes()):
        return []
    return [
        "full fine-tuning: the trained weights are in memory twice, before and after training "
        f"({format_bytes(size)} more)"
    ]
