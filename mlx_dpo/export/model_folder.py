"""Write a fused model in MLX's layout or as a Hugging Face checkpoint."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import save_config, save_model

from mlx_dpo.adapters.attach import adapted_layers, get_fine_tune_type
from mlx_dpo.adapters.hf_checkpoint import HFCheckpoint
from mlx_dpo.adapters.hf_names import (
    SAME_LAYOUT,
    TRANSPOSED,
    check_same_weights,
    find_hf_tensors,
    hf_tensor_name,
)
from mlx_dpo.adapters.merge import merged_weight
from mlx_dpo.adapters.targets import has_tied_embeddings
from mlx_dpo.errors import ModelError
from mlx_dpo.io.arrays import Arrays, named_arrays, read_arrays, write_arrays
from mlx_dpo.models.files import CONFIG, INDEX, TOKENIZER_FILES, weight_files
from mlx_dpo.models.license import LICENSE_PATTERNS

COPIED_FILES = (*TOKENIZER_FILES, "generation_config.json", "*.py", *LICENSE_PATTERNS)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def write_mlx(folder: Path, model: nn.Module, entries: Mapping[str, Any], source: Path) -> None:
    """Write a model and its configuration to `folder`, and copy the model's other files.

    Tokenizer files, generation settings, Python code and licenses are copied from `source`.
    """
    save_model(folder, model)
    save_config(dict(entries), folder / CONFIG)
    _copy(source, folder, COPIED_FILES)


def write_hf(
    folder: Path, changed: Arrays, checkpoint: HFCheckpoint, *, keep_dtype: bool = True
) -> None:
    """Write a copy of the checkpoint in which the tensors in `changed` replace the old tensors.

    With `keep_dtype`, every tensor keeps its dtype in the checkpoint. Only one file is in memory
    at a time, and each tensor is removed from `changed` once it is used.
    """
    assert checkpoint.folder is not None
    for file in weight_files(checkpoint.folder):
        arrays, metadata = read_arrays(file)
        for name in arrays.keys() & changed.keys():
            value = changed.pop(name)
            arrays[name] = value.astype(arrays[name].dtype) if keep_dtype else value
        mx.eval(arrays)
        write_arrays(folder / file.name, arrays, metadata)
    _copy(checkpoint.folder, folder, (CONFIG, INDEX, *COPIED_FILES))


def merged_tensors(
    model: nn.Module, entries: Mapping[str, Any], checkpoint: HFCheckpoint
) -> Arrays:
    """Return the new values of the checkpoint's tensors that training changed, by tensor name.

    Adapters are merged in float32.

    Raises:
        ModelError: a layer has no counterpart in the checkpoint, or its weights are not local.
    """
    kind = str(entries.get("model_type"))
    if checkpoint.folder is None:
        raise ModelError(f"{checkpoint.name}: its weights are needed; name a folder")
    if get_fine_tune_type(model) == "full":
        return _trained_weights(model, kind, checkpoint)
    matches = find_hf_tensors(model, entries, checkpoint, for_peft=False)
    check_same_weights(model, matches, checkpoint)
    tensors, changed = checkpoint.tensors(), {}
    for path, adapted in adapted_layers(model).items():
        merged = merged_weight(adapted, matches.pop_weight(path, tensors))
        is_transposed = path in matches.transposed
        changed[matches.names[path]] = mx.contiguous(merged.T) if is_transposed else merged
    return _add_tied_lm_head(changed, model, checkpoint)


def _trained_weights(model: nn.Module, kind: str, checkpoint: HFCheckpoint) -> Arrays:
    if kind not in SAME_LAYOUT - TRANSPOSED or checkpoint.is_quantized:
        raise ModelError(
            f"{checkpoint.name}: layers of `{kind}` are not known to have the same layout in a "
            "Hugging Face checkpoint"
        )
    changed = {
        hf_tensor_name(name, kind): value
        for name, value in named_arrays(model.parameters()).items()
    }
    for name, value in changed.items():
        if checkpoint.shapes.get(name) != value.shape:
            raise ModelError(f"{checkpoint.name}: no tensor `{name}` of shape {value.shape}")
    return _add_tied_lm_head(changed, model, checkpoint)


def _add_tied_lm_head(changed: Arrays, model: nn.Module, checkpoint: HFCheckpoint) -> Arrays:
    """Add the LM head to `changed` if it is tied but the checkpoint stores a copy of its weight."""
    if HEAD in checkpoint.shapes and EMBEDDING in changed and has_tied_embeddings(model):
        changed[HEAD] = changed[EMBEDDING]
    return changed


def set_config_dtype(entries: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return a copy of a model's configuration with this dtype and without quantization."""
    entries = json.loads(json.dumps(entries))
    for packing in ("quantization", "quantization_config"):
        entries.pop(packing, None)
    for part in (entries, entries.get("text_config") or {}):
        for key in part.keys() & {"torch_dtype", "dtype"}:
            part[key] = dtype
    return entries


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for file in {file for pattern in patterns for file in source.glob(pattern)}:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
