"""Adapters on disk, in mlx-lm's layout: `adapters.safetensors` beside `adapter_config.json`.

`mlx_lm.load(adapter_path=...)` reads what is written here; of what is read, the names of the
arrays decide which layers are adapted. `peft_layout` reads the other layout.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.adapters import master_weights as masters
from mlx_dpo.adapters import peft as peft_layout
from mlx_dpo.adapters.attach import (
    LoadedAdapter,
    adapter_weights,
    attach_adapters_at,
    read_adapter_weights,
    unfreeze_parameters,
)
from mlx_dpo.adapters.targets import has_tied_embeddings
from mlx_dpo.errors import ModelError, reason
from mlx_dpo.io.arrays import Arrays, named_arrays, write_arrays
from mlx_dpo.io.atomic import atomic_file, write_file
from mlx_dpo.models.files import read_json

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"
MLX_LM_KEYS = ("fine_tune_type", "num_layers", "lora_parameters")  # mlx-lm's settings


def save_adapter(folder: Path, model: nn.Module, config: dict[str, Any]) -> None:
    """Write weights and config into `folder`, each whole or not at all, weights last."""
    _write_config(folder, config)
    _write_weights(folder / WEIGHTS, adapter_weights(model), "mlx")


def add_peft_files(folder: Path, settings: dict[str, Any], arrays: Arrays) -> None:
    """Write PEFT's layout of the adapter in `folder` beside mlx-lm's.

    The file of settings is one for both: each program passes over what it does not know.
    """
    _write_weights(folder / peft_layout.WEIGHTS, arrays, "pt")
    _write_config(folder, _read_config(folder) | settings)


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    write_file(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def _write_weights(path: Path, arrays: Arrays, made_by: str) -> None:
    with atomic_file(path) as temporary:
        write_arrays(temporary, arrays, {"format": made_by})


def read_adapter(folder: Path) -> LoadedAdapter:
    """The adapter in `folder`, in mlx-lm's layout or in PEFT's; mlx-lm's where it has both.

    Raises:
        ModelError: a file is missing, damaged or of neither layout; or an adapter of PEFT does
            what cannot be carried over.
    """
    config = _read_config(folder)
    if _weights_path(folder, config) != folder / WEIGHTS:
        return peft_layout.read_peft_adapter(folder, config)
    path = folder / CONFIG
    way = config.get("fine_tune_type", "lora")
    if way not in ("lora", "dora", "full"):
        raise ModelError(f"{path}: fine_tune_type `{way}` is unknown; it is lora, dora or full")
    if way == "full":
        return LoadedAdapter(folder / WEIGHTS, way, read_adapter_weights(folder / WEIGHTS))
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise ModelError(f"{path}: not an adapter description in mlx-lm's layout")
    if missing := {"rank", "scale", "dropout"} - parameters.keys():
        raise ModelError(f"{path}: missing `{min(missing)}`")
    try:
        sizes = (int(parameters["rank"]), float(parameters["scale"]), float(parameters["dropout"]))
    except (TypeError, ValueError):
        raise ModelError(f"{path}: no numbers for `rank`, `scale` and `dropout`") from None
    return LoadedAdapter(folder / WEIGHTS, way, read_adapter_weights(folder / WEIGHTS), *sizes)


def adapter_digest(folder: Path) -> str:
    """SHA-256 over what `read_adapter` reads, in hex; the same with and without PEFT's layout
    beside mlx-lm's.

    Raises:
        ModelError: a file is missing.
    """
    config = _read_config(folder)
    path = _weights_path(folder, config)
    if path.name == WEIGHTS:
        config = {name: config.get(name) for name in MLX_LM_KEYS}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    try:
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    except OSError as error:
        raise ModelError(f"{path}: adapters cannot be read ({reason(error)})") from error
    return digest.hexdigest()


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise ModelError(f"{folder}: no `{CONFIG}`; is it an adapter or a run folder?")
    return read_json(path, str(path))


def _weights_path(folder: Path, config: dict[str, Any]) -> Path:
    is_peft = "peft_type" in config and not (folder / WEIGHTS).is_file()
    return folder / (peft_layout.WEIGHTS if is_peft else WEIGHTS)


def attach_loaded_adapter(model: nn.Module, saved: LoadedAdapter, *, dropout: float) -> None:
    """Attach a saved adapter to go on training it.

    Raises:
        ModelError: an array has no place in this model, or one is missing.
    """
    weights = saved.weights
    if saved.way == "full":
        here = named_arrays(model.parameters())
        _check_same_shapes(
            saved.where,
            {name: here[name].shape for name in saved.weights if name in here},
            saved.weights,
        )
        unfreeze_parameters(model, list(saved.weights))
    else:
        weights = peft_layout.to_mlx_names(weights, model)
        paths = list(dict.fromkeys(name.rpartition(".")[0] for name in weights))
        present = {path for path, _ in model.named_modules()}
        if strangers := [path for path in paths if path not in present]:
            raise ModelError(
                f"{saved.where}: adapters of another model; it has no `{strangers[0]}`"
            )
        if saved.tables and has_tied_embeddings(model):
            raise ModelError(
                f"{saved.where}: `{saved.tables[0]}` leaves the head as it is, which in this model "
                "is the same table, so that mlx-lm's layer adapts both; adapt other layers"
            )
        attach_adapters_at(
            model, paths, kind=saved.way, rank=saved.rank, scale=saved.scale, dropout=dropout
        )
    set_adapter_weights(model, weights, saved.where)


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Attach the adapter in `folder` to be used. Frozen afterwards.

    Raises:
        ModelError: as `read_adapter` and `attach_loaded_adapter`.
    """
    saved = read_adapter(folder)
    attach_loaded_adapter(model, saved, dropout=saved.dropout)
    model.freeze()
    model.eval()
    if saved.way == "full":
        masters.cast_permanently(model)


def load_adapter_weights(model: nn.Module, path: Path) -> None:
    """Load saved weights into attached adapters; names and shapes have to agree exactly.

    Raises:
        ModelError: they do not, or the file cannot be read.
    """
    set_adapter_weights(model, read_adapter_weights(path), path)


def set_adapter_weights(model: nn.Module, weights: Arrays, where: Path) -> None:
    """Give what is trained these values, in float32.

    Raises:
        ModelError: names or shapes do not agree exactly.
    """
    wanted = {name: value.shape for name, value in adapter_weights(model).items()}
    _check_same_shapes(where, wanted, weights)
    wide = [(name, value.astype(mx.float32)) for name, value in weights.items()]
    model.load_weights(wide, strict=False)  # strict would want the base as well


def _check_same_shapes(where: Path, wanted: dict[str, tuple[int, ...]], weights: Arrays) -> None:
    found = {name: value.shape for name, value in weights.items()}
    names = {name for name in wanted | found if wanted.get(name) != found.get(name)}
    if names:
        name = min(names)
        raise ModelError(
            f"{where}: adapters of another model; `{name}` is {found.get(name, 'absent')} there "
            f"and {wanted.get(name, 'absent')} here"
        )
