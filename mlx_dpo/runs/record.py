"""What `run.json` says of a run, and whether two records are of the same one."""

import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from secrets import token_hex
from typing import Any

from mlx_dpo.config import DPOConfig
from mlx_dpo.errors import RunError
from mlx_dpo.policy.adapter_files import content_digest
from mlx_dpo.runs.inputs import Inputs
from mlx_dpo.runs.paths import RunPaths

SCORER = 2  # to be raised when the same pairs get other log-probabilities than before

CONTENTS = {
    "model": "the model",
    "tokenizer": "the tokenizer",
    "held": "the device, or the number type of the weights on it,",
    "train": "the training pairs",
    "valid": "the held-out pairs",
    "start": "the start adapter",
    "reference": "the reference model",
}


def start_provenance(config: DPOConfig) -> dict[str, Any]:
    """The adapter that a run starts from, by content; nothing if it starts from none.

    Raises:
        ModelError: there is none where the settings say.
    """
    folder = config.start_adapter
    return {} if folder is None else {"start": content_digest(Path(folder))}


def new_record(
    config: DPOConfig,
    inputs: Inputs,
    start: dict[str, Any],
    earlier: Mapping[str, Any] | None = None,
    *,
    total_steps: int,
) -> dict[str, Any]:
    """The record of a run that is about to begin; `start` as `start_provenance` says.

    A run that goes on keeps the id of its `earlier` record.
    """
    return {
        "id": (earlier or {}).get("id") or token_hex(8),
        "state": "unfinished",
        "steps": total_steps,
        "settings": config.to_dict(),
        "provenance": inputs.provenance(config) | start,
        "counts": {"train": len(inputs.train), "valid": len(inputs.valid)},
        "pairs": [report.to_dict() for report in inputs.reports],
        # From the run folder, so that the run opens from any current folder.
        "model_folder": _relative(config.model, config.output),
        "reference_folder": config.reference_model
        and _relative(config.reference_model, config.output),
        "start_folder": config.start_adapter and _relative(config.start_adapter, config.output),
        "versions": {name: version(name) for name in ("mlx-dpo", "mlx", "mlx-lm")},
        "evaluation": None,
        "kept": None,
        "stopped_early_at": None,
        "warnings": [],
    }


def hub_model(record: Mapping[str, Any]) -> str | None:
    """The Hub id of the model that a run is trained on; None for a folder, whose path would mean
    nothing elsewhere.
    """
    return None if record["model_folder"] else str(record["settings"]["model"])


def _relative(model: str, output: str) -> str | None:
    folder = Path(model).expanduser()
    return os.path.relpath(folder, output) if folder.is_dir() else None


def check_resumable(
    paths: RunPaths, earlier: dict[str, Any], config: DPOConfig, *, resume: bool
) -> None:
    """Refuse to write over a run, or to go on with one under settings of another result.

    Raises:
        RunError: says what the folder holds, or names the first setting that differs.
    """
    if earlier["state"] == "finished":
        steps = earlier.get("stopped_early_at") or earlier["steps"]
        raise RunError(
            f"{paths.folder}: this run is finished after {steps} steps; choose another --output"
        )
    if not resume:
        raise RunError(
            f"{paths.folder}: holds an unfinished run; add --resume to go on with it, or choose "
            "another --output"
        )
    before = DPOConfig.from_dict(earlier["settings"])
    if (name := before.differing(config)) is not None:
        raise RunError(
            f"{paths.folder}: the run began with {name} = {_said(getattr(before, name))}, not "
            f"{_said(getattr(config, name))}; resume with the same settings, or choose another "
            "--output"
        )


def _said(value: Any) -> str:
    return "its default" if value is None else repr(value)


def check_contents(paths: RunPaths, earlier: dict[str, Any], now: Mapping[str, str]) -> None:
    """Refuse to go on where something that the run depends on is not what it was.

    Raises:
        RunError: names what changed.
    """
    for name, content in now.items():
        if earlier["provenance"][name] != content:
            raise RunError(
                f"{paths.folder}: {CONTENTS[name]} changed since the run began; "
                "restore what was there"
            )


def reference_provenance(record: dict[str, Any], held: str) -> str:
    """What, beside token ids, determines the reference's log-probabilities.

    `held` says on what device and in what number type it is asked now.
    """
    settings = {name: record["settings"][name] for name in ("bits", "group_size", "dtype")}
    contents = {"model": record["provenance"]["model"], "held": held}
    if start := record["provenance"].get("start"):
        contents["start"] = start
    if (alpha := record["settings"].get("ld_alpha")) is not None:
        settings["ld_alpha"] = alpha
    versions = {name: version(name) for name in ("mlx", "mlx-lm")}
    return json.dumps({"scorer": SCORER, **contents, **settings, **versions})
