"""Match adapted layers with the tensors of a Hugging Face checkpoint, and make PEFT adapters.

Layers are matched only in architectures whose logits were compared with those of transformers and
PEFT (tests/export/test_torch.py), and only if the checkpoint has the layer's weight in the right
shape.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.adapters.attach import adapted_layers, get_fine_tune_type
from mlx_dpo.adapters.hf_checkpoint import HFCheckpoint
from mlx_dpo.adapters.layers import EMBEDDING_TYPES, EXPERT_TYPES, DoRAEmbedding, base_layer
from mlx_dpo.adapters.peft import PATH_PREFIXES, make_peft_config, make_peft_weights
from mlx_dpo.adapters.targets import has_tied_embeddings
from mlx_dpo.errors import ModelError
from mlx_dpo.io.arrays import Arrays, scalar
from mlx_dpo.models.device import float32_weight

# `model_type`s whose linear layers have the same paths and weights in transformers.
SAME_LAYOUT = {
    "cohere", "cohere2", "dbrx", "ernie4_5", "gemma", "gemma2", "gemma3_text", "glm4", "gpt2",
    "granite", "granitemoe", "helium", "hunyuan_v1_dense", "lfm2", "lfm2_moe", "llama", "mistral",
    "mixtral", "nemotron", "olmo2", "olmoe", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2",
}  # fmt: skip
TRANSPOSED = {"gpt2"}  # checkpoints store weights of linear layers as (in, out)
CHECKPOINT_PREFIXES = {"gpt2": ("model.", "")}  # like PATH_PREFIXES, in checkpoint files
ROUTER_NAMES = ("gate", "router")  # plain parameters in transformers, next to experts
MIN_COSINE = 0.9  # of a weight and its quantized version: 2 bits give about 0.9


@dataclass(frozen=True)
class HFTensors:
    """The checkpoint's tensor of each adapted layer, and PEFT's `target_modules` for the layers."""

    names: dict[str, str]  # of the tensors, by path of the layer
    target_modules: list[str]  # PEFT's setting
    transposed: frozenset[str]  # paths of the layers whose tensors are stored as (in, out)

    def pop_weight(self, path: str, tensors: Arrays) -> mx.array:
        """Remove the weight of the layer at `path` from `tensors` and return the weight. (out, in)

        The weight's memory can then be freed as soon as the caller has used it.
        """
        tensor = tensors.pop(self.names[path])
        return tensor.T if path in self.transposed else tensor


def find_hf_tensors(
    model: nn.Module, entries: Mapping[str, Any], checkpoint: HFCheckpoint, *, for_peft: bool = True
) -> HFTensors:
    """Find the checkpoint's tensor of each adapted layer.

    Args:
        entries: Content of the model's `config.json`.
        for_peft: Whether PEFT must be able to adapt each layer, too.

    Raises:
        ModelError: the model was fully fine-tuned, its architecture is not supported, or the
            checkpoint is quantized by MLX; or the checkpoint has no tensor for an adapted layer, or
            PEFT cannot adapt the layer.
    """
    model_type = str(entries.get("model_type"))
    _check_model(model, model_type, checkpoint)
    modules = dict(model.named_modules())
    names, transposed = {}, set()
    for path, adapted in adapted_layers(model).items():
        layer = base_layer(adapted)
        _check_no_experts(path, layer)
        if for_peft:
            _check_peft_can_adapt(model, modules, path, layer)
        names[path] = hf_tensor_name(f"{path}.weight", model_type)
        shape = _weight_shape(layer)
        if model_type in TRANSPOSED and not isinstance(layer, EMBEDDING_TYPES):
            shape = shape[::-1]
            transposed.add(path)
        if (hf_shape := checkpoint.shapes.get(names[path])) != shape:
            problem = f"its shape is {hf_shape}" if hf_shape else "no tensor has this name"
            raise ModelError(
                f"`{path}`: {checkpoint.name} has no `{names[path]}` of shape {shape}: {problem}"
            )
    targets = _target_modules(names, model_type, checkpoint)
    return HFTensors(names, targets, frozenset(transposed))


def hf_tensor_name(name: str, model_type: str) -> str:
    """Return the name that an MLX model's parameter `name` has in a Hugging Face checkpoint."""
    mlx_prefix, hf_prefix = CHECKPOINT_PREFIXES.get(model_type, ("", ""))
    return hf_prefix + name.removeprefix(mlx_prefix)


def check_same_weights(model: nn.Module, matches: HFTensors, checkpoint: HFCheckpoint) -> None:
    """Check that the adapted layers' base weights equal the checkpoint's, up to quantization.

    The two weights of a layer count as equal if their cosine similarity exceeds `MIN_COSINE`. A
    checkpoint on the Hub is not checked, because only its headers are known.

    Raises:
        ModelError: the weights of a layer differ; the message names the layer.
    """
    tensors = checkpoint.tensors()
    for path, adapted in adapted_layers(model).items() if tensors else ():
        weight = float32_weight(base_layer(adapted))
        hf_weight = matches.pop_weight(path, tensors).astype(mx.float32)
        norms = mx.sqrt(mx.square(weight).sum() * mx.square(hf_weight).sum())
        cosine = (weight * hf_weight).sum() / norms
        if not scalar(cosine) > MIN_COSINE:
            raise ModelError(
                f"{checkpoint.name}: `{path}` does not match the weights of the trained model "
                f"(cosine {scalar(cosine):.2f}); name the checkpoint that the model was made from"
            )


def _check_model(model: nn.Module, model_type: str, checkpoint: HFCheckpoint) -> None:
    if get_fine_tune_type(model) == "full":
        raise ModelError(
            "weights of the model itself were trained, so there is no adapter; write the whole "
            "model with `mlx-dpo fuse --to hf`"
        )
    if model_type not in SAME_LAYOUT:
        raise ModelError(
            f"layers of `{model_type}` have not been verified against transformers, or differ "
            "from them"
        )
    if checkpoint.is_quantized:
        raise ModelError(
            f"{checkpoint.name} was quantized by MLX, which transformers cannot read; name the "
            "Hugging Face checkpoint that it was made from with `--base-model` (of `mlx-dpo "
            "export` or `fuse`)"
        )


def _check_no_experts(path: str, layer: nn.Module) -> None:
    if isinstance(layer, EXPERT_TYPES):
        raise ModelError(
            f"`{path}` stacks the experts of a layer; a Hugging Face checkpoint stores them one "
            "by one or stacks them differently"
        )


def _check_peft_can_adapt(
    model: nn.Module, modules: dict[str, nn.Module], path: str, layer: nn.Module
) -> None:
    parts = path.split(".")
    for end in range(1, len(parts)):
        parent = modules.get(".".join(parts[:end]))
        if parts[end] in ROUTER_NAMES and parent is not None and _has_experts(parent):
            raise ModelError(
                f"`{path}` is the router of a layer of experts, which is not a linear layer in "
                "transformers; leave it out with `lora_target_modules`"
            )
    if isinstance(modules[path], DoRAEmbedding):
        raise ModelError(
            f"`{path}`: DoRA scales the rows of the embeddings here and in mlx-lm, but the "
            "columns in PEFT"
        )
    if isinstance(layer, EMBEDDING_TYPES) and has_tied_embeddings(model):
        raise ModelError(
            f"`{path}` is tied to the LM head, and PEFT would adapt the embeddings without the head"
        )


def _has_experts(module: nn.Module) -> bool:
    return any(isinstance(child, EXPERT_TYPES) for child in module.modules())


def _weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """Return the shape (out, in) of a layer's weight, dequantized if it is quantized."""
    rows, width = layer.weight.shape
    return rows, width * 32 // layer.bits if "scales" in layer else width


def _target_modules(
    names: Mapping[str, str], model_type: str, checkpoint: HFCheckpoint
) -> list[str]:
    """Return PEFT's `target_modules` for the layers in `names`.

    The entries are the last parts of the layers' paths (such as `q_proj`) if no other layer of the
    checkpoint has the same last part, otherwise the full paths.
    """
    last_parts = sorted({path.rpartition(".")[2] for path in names})
    endings = tuple(f".{name}.weight" for name in last_parts)
    matched = {name for name in checkpoint.shapes if f".{name}".endswith(endings)}
    if matched == set(names.values()):
        return last_parts
    mlx_prefix, hf_prefix = PATH_PREFIXES.get(model_type, ("", ""))
    return [hf_prefix + path.removeprefix(mlx_prefix) for path in names]


def make_peft_adapter(
    model: nn.Module,
    entries: Mapping[str, Any],
    checkpoint: HFCheckpoint,
    *,
    rslora: bool = False,
    base_model: str | None = None,
    revision: str | None = None,
) -> tuple[dict[str, Any], Arrays]:
    """Return PEFT's `adapter_config.json` and adapter weights for the model's adapters.

    Args:
        entries: Content of the base model's `config.json`.
        checkpoint: Hugging Face checkpoint against which names and shapes are checked.
        rslora: Whether the adapters' scale is alpha / sqrt(rank) instead of alpha / rank.
        base_model: Hub id of the checkpoint; None for a folder, whose path means nothing on other
            machines.
        revision: Revision of the checkpoint on the Hub.

    Raises:
        ModelError: an adapted layer has no counterpart in transformers, or its base weights differ
            from the checkpoint's.
    """
    matches = find_hf_tensors(model, entries, checkpoint)
    check_same_weights(model, matches, checkpoint)
    settings = make_peft_config(
        model, matches.target_modules, rslora=rslora, transposed=bool(matches.transposed)
    )
    settings |= {"base_model_name_or_path": base_model, "revision": revision}
    return settings, make_peft_weights(model, str(entries["model_type"]))
