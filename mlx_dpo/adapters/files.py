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
from mlx_dpo.adapters.attach import Saved, adapter_weights, attach_at, read_weights, unfreeze
from mlx_dpo.adapters.targets import is_tied
from mlx_dpo.errors import ModelError, reason
from mlx_dpo.io.arrays import Arrays, named_arrays, write_arrays
from mlx_dpo.io.atomic import atomic_file, write_file
from mlx_dpo.models.files import read_json

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"
READ = ("fine_tune_type", "num_layers", "lora_parameters")  # mlx-lm's settings


def save_adapter(folder: Path, model: nn.Module, config: dict[str, Any]) -> None:
    """Write weights and config into `folder`, each whole or not at all, weights last."""
    _put_config(folder, config)
    _put_arrays(folder / WEIGHTS, adapter_weights(model), "mlx")


def add_peft(folder: Path, settings: dict[str, Any], arrays: Arrays) -> None:
    """Write PEFT's layout of the adapter in `folder` beside mlx-lm's.

    The file of settings is one for both: each program passes over what it does not know.
    """
    _put_arrays(folder / peft_layout.WEIGHTS, arrays, "pt")
    _put_config(folder, _read_config(folder) | settings)


def _put_config(folder: Path, config: dict[str, Any]) -> None:
    write_file(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def _put_arrays(path: Path, arrays: Arrays, made_by: str) -> None:
    with atomic_file(path) as temporary:
        write_arrays(temporary, arrays, {"format": made_by})


def read_adapter(folder: Path) -> Saved:
    """The adapter in `folder`, in mlx-lm's layout or in PEFT's; mlx-lm's where it has both.

    Raises:
        ModelError: a file is missing, damaged or of neither layout; or an adapter of PEFT does
            what cannot be carried over.
    """
    config = _read_config(folder)
    if _weights_of(folder, config) != folder / WEIGHTS:
        return peft_layout.read(folder, config)
    path = folder / CONFIG
    way = config.get("fine_tune_type", "lora")
    if way not in ("lora", "dora", "full"):
        raise ModelError(f"{path}: fine_tune_type `{way}` is unknown; it is lora, dora or full")
    if way == "full":
        return Saved(folder / WEIGHTS, way, read_weights(folder / WEIGHTS))
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise ModelError(f"{path}: not an adapter description in mlx-lm's layout")
    if missing := {"rank", "scale", "dropout"} - parameters.keys():
        raise ModelError(f"{path}: missing `{min(missing)}`")
    try:
        sizes = (int(parameters["rank"]), float(parameters["scale"]), float(parameters["dropout"]))
    except (TypeError, ValueError):
        raise ModelError(f"{path}: no numbers for `rank`, `scale` and `dropout`") from None
    return Saved(folder / WEIGHTS, way, read_weights(folder / WEIGHTS), *sizes)


def content_digest(folder: Path) -> str:
    """SHA-256 over what `read_adapter` reads, in hex; the same with and without PEFT's layout
    beside mlx-lm's.

    Raises:
        ModelError: a file is missing.
    """
    config = _read_config(folder)
    path = _weights_of(folder, config)
    if path.name == WEIGHTS:
        config = {name: config.get(name) for name in READ}
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


def _weights_of(folder: Path, config: dict[str, Any]) -> Path:
    is_peft = "peft_type" in config and not (folder / WEIGHTS).is_file()
    return folder / (peft_layout.WEIGHTS if is_peft else WEIGHTS)


def start_from(model: nn.Module, saved: Saved, *, dropout: float) -> None:
    """Attach a saved adapter to go on training it.

    Raises:
        ModelError: an array has no place in this model, or one is missing.
    """
    weights = saved.weights
    if saved.way == "full":
        here = named_arrays(model.parameters())
        _refuse_other_model(
            saved.where,
            {name: here[name].shape for name in saved.weights if name in here},
            saved.weights,
        )
        unfreeze(model, list(saved.weights))
    else:
        weights = peft_layout.own_names(weights, model)
        paths = list(dict.fromkeys(name.rpartition(".")[0] for name in weights))
        present = {path for path, _ in model.named_modules()}
        if strangers := [path for path in paths if path not in present]:
            raise ModelError(
                f"{saved.where}: adapters of another model; it has no `{strangers[0]}`"
            )
        if saved.tables and is_tied(model):
            raise ModelError(
                f"{saved.where}: `{saved.tables[0]}` leaves the head as it is, which in this model "
                "is the same table, so that mlx-lm's layer adapts both; adapt other layers"
            )
        attach_at(model, paths, kind=saved.way, rank=saved.rank, scale=saved.scale, dropout=dropout)
    put_weights(model, weights, saved.where)


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Attach the adapter in `folder` to be used. Frozen afterwards.

    Raises:
        ModelError: as `read_adapter` and `start_from`.
    """
    saved = read_adapter(folder)
    start_from(model, saved, dropout=saved.dropout)
    model.freeze()
    model.eval()
    if saved.way == "full":
        masters.settle(model)


def load_adapter_weights(model: nn.Module, path: Path) -> None:
    """Load saved weights into attached adapters; names and shapes have to agree exactly.

    Raises:
        ModelError: they do not, or the file cannot be read.
    """
    put_weights(model, read_weights(path), path)


def put_weights(model: nn.Module, weights: Arrays, where: Path) -> None:
    """Give what is trained these values, in float32.

    Raises:
        ModelError: names or shapes do not agree exactly.
    """
    wanted = {name: value.shape for name, value in adapter_weights(model).items()}
    _refuse_other_model(where, wanted, weights)
    wide = [(name, value.astype(mx.float32)) for name, value in weights.items()]
    model.load_weights(wide, strict=False)  # strict would want the base as well


def _refuse_other_model(where: Path, wanted: dict[str, tuple[int, ...]], weights: Arrays) -> None:
    found = {name: value.shape for name, value in weights.items()}
    names = {name for name in wanted | found if wanted.get(name) != found.get(name)}
    if names:
        name = min(names)
        raise ModelError(
            f"{where}: adapters of another model; `{name}` is {found.get(name, 'absent')} there "
            f"and {wanted.get(name, 'absent')} here"
        )
