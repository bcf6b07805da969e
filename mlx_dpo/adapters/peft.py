"""Convert adapters between PEFT's layout (`adapter_model.safetensors`) and mlx-lm's.

PEFT stores A and B transposed, and its parameter names begin with those of its wrapper classes.
LoRA, rsLoRA and DoRA are supported; any other PEFT setting that changes the computation raises an
error. `adapters.hf_names` checks which layers have a counterpart in transformers.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.adapters.attach import (
    LoadedAdapter,
    adapted_layers,
    get_fine_tune_type,
    read_adapter_weights,
)
from mlx_dpo.adapters.layers import LoRAEmbedding, adapter_dropout, adapter_rank
from mlx_dpo.errors import ModelError
from mlx_dpo.io.arrays import Arrays

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Suffix in PEFT: suffix in mlx-lm, and whether the matrix is transposed.
WEIGHT_SUFFIXES = {
    ".lora_A.weight": (".lora_a", True),
    ".lora_B.weight": (".lora_b", True),
    ".lora_embedding_A": (".lora_a", True),
    ".lora_embedding_B": (".lora_b", True),
    ".lora_magnitude_vector": (".m", False),
    ".lora_magnitude_vector.weight": (".m", False),
}

# Prefixes of layer paths in mlx-lm and in transformers, where they differ.
PATH_PREFIXES = {"gpt2": ("model.", "transformer.")}

# Settings that are read, and settings that do not change what an adapter computes.
SUPPORTED = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias",
        "init_lora_weights"}  # fmt: skip
IGNORED = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "megatron_core", "eva_config", "corda_config", "lora_ga_config",
    "loftq_config", "qalora_group_size", "runtime_config", "ensure_weight_tying",
    "fan_in_fan_out",  # the layout of the base in torch; that of A and B is the same
    "fine_tune_type", "num_layers", "lora_parameters",
}  # fmt: skip
UNSUPPORTED = {
    "modules_to_save": "it saves whole layers, which would be trained in addition to the adapter",
    "rank_pattern": "its ranks differ between layers, which mlx-lm's format cannot store",
    "alpha_pattern": "its scales differ between layers, which mlx-lm's format cannot store",
    "layer_replication": "it repeats layers of the model",
    "target_parameters": "adapters on single parameters are not supported",
}
SUPPORTED_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


def read_peft_adapter(folder: Path, config: dict[str, Any]) -> LoadedAdapter:
    """Read the PEFT adapter in `folder`, whose `adapter_config.json` contains `config`.

    Raises:
        ModelError: the adapter is damaged, or has a setting that is not supported.
    """
    where = f"{folder}/adapter_config.json"
    _check_supported(config, where)
    try:
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        dropout = float(config.get("lora_dropout") or 0.0)
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{where}: `r`, `lora_alpha` and `lora_dropout` must be numbers") from None
    if rank < 1 or not math.isfinite(alpha):
        raise ModelError(f"{where}: no adapter has `r` {rank} and `lora_alpha` {alpha:g}")
    weights = _read_weights(folder)
    embeddings = tuple(name for name in weights if name.endswith("lora_embedding_A"))
    if config.get("use_dora") and embeddings:
        raise ModelError(
            f"{where}: `{embeddings[0]}`: DoRA scales the columns of the embeddings in PEFT, but "
            "their rows in mlx-lm; adapt other layers"
        )
    return LoadedAdapter(
        path=folder / WEIGHTS,
        fine_tune_type="dora" if config.get("use_dora") else "lora",
        weights=_to_mlx_weights(weights, folder / WEIGHTS),
        untied_embeddings=embeddings,
        rank=rank,
        scale=alpha / (math.sqrt(rank) if config.get("use_rslora") else rank),
        dropout=dropout,
    )


def _check_supported(config: dict[str, Any], where: str) -> None:
    if config["peft_type"] != "LORA":
        raise ModelError(f"{where}: peft_type `{config['peft_type']}` is not supported; use LORA")
    if config.get("bias", "none") != "none":
        raise ModelError(f"{where}: `bias` is `{config['bias']}`; adapters here have no biases")
    if (start := config.get("init_lora_weights")) not in SUPPORTED_INITS:
        raise ModelError(
            f"{where}: `init_lora_weights` is `{start}`, which changes the model as well; convert "
            "the adapter with PEFT's `path_initial_model_for_weight_conversion`"
        )
    for name in sorted(config.keys() - SUPPORTED - IGNORED):
        if config[name]:
            why = UNSUPPORTED.get(name, "it is not supported here")
            raise ModelError(f"{where}: `{name}` is set ({config[name]!r}), but {why}")


def _read_weights(folder: Path) -> Arrays:
    if not (folder / WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
        raise ModelError(
            f"{folder}: weights are pickled (`adapter_model.bin`), and pickles can run code, so "
            "they are never loaded; save the adapter as safetensors with PEFT"
        )
    return read_adapter_weights(folder / WEIGHTS)


def _to_mlx_weights(weights: Arrays, where: Path) -> Arrays:
    renamed: Arrays = {}
    for name, value in weights.items():
        suffix = next((end for end in WEIGHT_SUFFIXES if name.endswith(end)), None)
        if suffix is None or not name.startswith(PREFIX):
            raise ModelError(f"{where}: `{name}` is not part of a supported adapter")
        mlx_suffix, transposed = WEIGHT_SUFFIXES[suffix]
        path = name.removeprefix(PREFIX).removesuffix(suffix)
        # Contiguous, because products with a transposed view are rounded differently than after
        # saving and loading the adapter.
        renamed[path + mlx_suffix] = mx.contiguous(value.T) if transposed else value
    return renamed


def hf_path(path: str, model_type: str) -> str:
    """Convert the path of a layer in mlx-lm to the layer's path in transformers."""
    mlx_prefix, hf_prefix = PATH_PREFIXES.get(model_type, ("", ""))
    return hf_prefix + path.removeprefix(mlx_prefix)


def to_mlx_names(weights: Arrays, model: nn.Module) -> Arrays:
    """Return the adapter weights with the layer paths of transformers replaced by mlx-lm's.

    Weights that have the MLX model's paths already are returned unchanged.
    """
    mlx_prefix, hf_prefix = PATH_PREFIXES.get(getattr(model, "model_type", ""), ("", ""))
    if not all(name.startswith(hf_prefix) for name in weights):
        return weights
    return {mlx_prefix + name.removeprefix(hf_prefix): value for name, value in weights.items()}


def make_peft_weights(model: nn.Module, model_type: str) -> Arrays:
    """Return the adapter weights of the model with PEFT's names and layout."""
    weights: Arrays = {}
    for path, module in adapted_layers(model).items():
        prefix = PREFIX + hf_path(path, model_type)
        a, b = ".lora_A.weight", ".lora_B.weight"
        if isinstance(module, LoRAEmbedding):
            a, b = ".lora_embedding_A", ".lora_embedding_B"
        weights[prefix + a] = mx.contiguous(module.lora_a.T)
        weights[prefix + b] = mx.contiguous(module.lora_b.T)
        if "m" in module:
            weights[prefix + ".lora_magnitude_vector"] = module.m
    return weights


def make_peft_config(
    model: nn.Module, target_modules: Sequence[str], *, rslora: bool, transposed: bool
) -> dict[str, Any]:
    """Return the content of PEFT's `adapter_config.json` for the model's adapters.

    Args:
        target_modules: PEFT's `target_modules`.
        rslora: Whether the scale is written as alpha / sqrt(rank) instead of alpha / rank.
        transposed: Whether the torch model stores the base weights as (in, out).
    """
    layer = next(iter(adapted_layers(model).values()))
    rank = adapter_rank(layer)
    alpha = layer.scale * (math.sqrt(rank) if rslora else rank)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": round(alpha, 9),  # an integer again if it was one
        "lora_dropout": adapter_dropout(layer),
        "use_rslora": rslora,
        "use_dora": get_fine_tune_type(model) == "dora",
        "target_modules": list(target_modules),
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
    }
