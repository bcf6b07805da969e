"""Read and write adapters in mlx-lm's layout: `adapters.safetensors` and `adapter_config.json`.

`mlx_lm.load(adapter_path=...)` can load the folders that this module writes. The names of an
adapter's arrays determine which layers the adapter is attached to. `adapters.peft` reads adapters
in PEFT's layout.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.adapters import master_weights, peft
from mlx_dpo.adapters.attach import (
    LoadedAdapter,
    adapter_weights,
    attach_adapters_at,
    read_adapter_weights,
    unfreeze_parameters,
)
from mlx_dpo.adapters.targets import has_tied_embeddings
from mlx_dpo.errors import ModelError, reason
from mlx_dpo.io.arrays import Arrays, named_arrays
from mlx_dpo.io.atomic import atomic_file, write_file
from mlx_dpo.io.checksums import to_checked_json, verify_arrays, write_checked_arrays
from mlx_dpo.models.files import read_json

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"
MLX_LM_KEYS = ("fine_tune_type", "num_layers", "lora_parameters")


def save_adapter(folder: Path, model: nn.Module, config: dict[str, Any]) -> str:
    """Write the model's adapter weights and the adapter configuration `config` to `folder`.

    Each file is written atomically, the weights last.

    Returns:
        The checksum of the weight file.
    """
    _write_config(folder, config)
    return _write_weights(folder / WEIGHTS, adapter_weights(model), "mlx")


def add_peft_files(folder: Path, settings: dict[str, Any], arrays: Arrays) -> None:
    """Add PEFT's files to a folder that contains an adapter in mlx-lm's layout.

    Args:
        settings: PEFT's entries for `adapter_config.json`. Both layouts use this file; mlx-lm and
            PEFT ignore each other's entries.
        arrays: Adapter weights with PEFT's names.
    """
    _write_weights(folder / peft.WEIGHTS, arrays, "pt")
    _write_config(folder, _read_config(folder) | settings)


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    write_file(folder / CONFIG, to_checked_json(config))


def _write_weights(path: Path, arrays: Arrays, framework: str) -> str:
    with atomic_file(path) as temporary:
        return write_checked_arrays(temporary, arrays, {"format": framework})


def read_adapter(folder: Path) -> LoadedAdapter:
    """Read the adapter in `folder`, in mlx-lm's layout or in PEFT's.

    If the folder contains the weights in both layouts, those in mlx-lm's layout are read.

    Raises:
        ModelError: a file is missing, damaged or of neither layout; or a PEFT adapter has a setting
            that is not supported.
    """
    config = _read_config(folder)
    if _weights_path(folder, config) != folder / WEIGHTS:
        return peft.read_peft_adapter(folder, config)
    path = folder / CONFIG
    fine_tune_type = config.get("fine_tune_type", "lora")
    if fine_tune_type not in ("lora", "dora", "full"):
        raise ModelError(
            f"{path}: fine_tune_type `{fine_tune_type}` is unknown; it is lora, dora or full"
        )
    if fine_tune_type == "full":
        return LoadedAdapter(
            folder / WEIGHTS, fine_tune_type, read_adapter_weights(folder / WEIGHTS)
        )
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise ModelError(f"{path}: not an adapter description in mlx-lm's layout")
    if missing := {"rank", "scale", "dropout"} - parameters.keys():
        raise ModelError(f"{path}: missing `{min(missing)}`")
    try:
        sizes = (int(parameters["rank"]), float(parameters["scale"]), float(parameters["dropout"]))
    except (TypeError, ValueError):
        raise ModelError(f"{path}: `rank`, `scale` and `dropout` must be numbers") from None
    weights = read_adapter_weights(folder / WEIGHTS)
    return LoadedAdapter(folder / WEIGHTS, fine_tune_type, weights, *sizes)


def adapter_digest(folder: Path) -> str:
    """Return the SHA-256 (hex) of the configuration and weights of the adapter in `folder`.

    The digest covers what `read_adapter` reads: in a folder with both layouts, PEFT's files are
    ignored.

    Raises:
        DamagedFileError: a file does not match its checksum.
        ModelError: a file is missing.
    """
    config = _read_config(folder)
    path = _weights_path(folder, config)
    if path.name == WEIGHTS:
        config = {name: config.get(name) for name in MLX_LM_KEYS}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    try:
        verify_arrays(path)
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
    return folder / (peft.WEIGHTS if is_peft else WEIGHTS)


def attach_loaded_adapter(model: nn.Module, adapter: LoadedAdapter, *, dropout: float) -> None:
    """Attach the adapter to the model with its trained weights, ready for further training.

    Raises:
        ModelError: the adapter belongs to another model (a name or shape differs), the model has
            adapters already, or a layer cannot be adapted.
    """
    weights = adapter.weights
    if adapter.fine_tune_type == "full":
        parameters = named_arrays(model.parameters())
        shapes = {name: parameters[name].shape for name in weights if name in parameters}
        _check_same_shapes(adapter.path, shapes, weights)
        unfreeze_parameters(model, list(weights))
    else:
        weights = peft.to_mlx_names(weights, model)
        paths = list(dict.fromkeys(name.rpartition(".")[0] for name in weights))
        _check_adaptable(model, adapter, paths)
        attach_adapters_at(
            model,
            paths,
            kind=adapter.fine_tune_type,
            rank=adapter.rank,
            scale=adapter.scale,
            dropout=dropout,
        )
    set_adapter_weights(model, weights, adapter.path)


def _check_adaptable(model: nn.Module, adapter: LoadedAdapter, paths: list[str]) -> None:
    modules = {path for path, _ in model.named_modules()}
    if unknown := [path for path in paths if path not in modules]:
        raise ModelError(
            f"{adapter.path}: the adapter belongs to another model; this model has "
            f"no `{unknown[0]}`"
        )
    if adapter.untied_embeddings and has_tied_embeddings(model):
        raise ModelError(
            f"{adapter.path}: `{adapter.untied_embeddings[0]}` leaves the head as it is, which in "
            "this model is the same table, so that mlx-lm's layer adapts both; adapt other layers"
        )


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Attach the adapter in `folder` to the model, and prepare the model for inference.

    The model is frozen and in evaluation mode afterwards.

    Raises:
        ModelError: the adapter cannot be read, or does not fit the model.
    """
    adapter = read_adapter(folder)
    attach_loaded_adapter(model, adapter, dropout=adapter.dropout)
    model.freeze()
    model.eval()
    if adapter.fine_tune_type == "full":
        master_weights.cast_permanently(model)


def load_adapter_weights(model: nn.Module, path: Path) -> None:
    """Load the weight file `path` into the adapters that are attached to the model.

    Raises:
        ModelError: names or shapes differ, or the file cannot be read.
    """
    set_adapter_weights(model, read_adapter_weights(path), path)


@contextmanager
def with_adapter_weights(model: nn.Module, adapter: LoadedAdapter) -> Iterator[None]:
    """Give the model's adapters the weights of `adapter` inside the `with` block.

    Afterwards they have the arrays from before.

    Raises:
        ModelError: names or shapes differ from those of the trainable parameters.
    """
    before = adapter_weights(model)
    set_adapter_weights(model, peft.to_mlx_names(adapter.weights, model), adapter.path)
    try:
        yield
    finally:
        model.load_weights(list(before.items()), strict=False)


def set_adapter_weights(model: nn.Module, weights: Arrays, path: Path) -> None:
    """Set the trainable parameters of the model to `weights`, cast to float32.

    Args:
        path: File that the weights come from, for error messages.

    Raises:
        ModelError: names or shapes of `weights` differ from those of the trainable parameters.
    """
    shapes = {name: value.shape for name, value in adapter_weights(model).items()}
    _check_same_shapes(path, shapes, weights)
    float32 = [(name, value.astype(mx.float32)) for name, value in weights.items()]
    model.load_weights(float32, strict=False)  # strict would ask for the base's weights as well


def _check_same_shapes(path: Path, expected: dict[str, tuple[int, ...]], weights: Arrays) -> None:
    shapes = {name: value.shape for name, value in weights.items()}
    names = {name for name in expected | shapes if expected.get(name) != shapes.get(name)}
    if names:
        name = min(names)
        raise ModelError(
            f"{path}: adapters of another model; `{name}` is {shapes.get(name, 'absent')} there "
            f"and {expected.get(name, 'absent')} here"
        )
