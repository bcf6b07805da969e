"""Which layer of transformers a layer here is, proved on the checkpoint both were made from.

A layer has a counterpart if its architecture was held against transformers and PEFT, logits
against logits (tests/hub/test_torch.py), and the checkpoint has its weight in its shape.
Knows no files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.adapters import peft as peft_layout
from mlx_dpo.adapters.attach import adapted_layers, get_fine_tune_type
from mlx_dpo.adapters.hf_checkpoint import HFCheckpoint
from mlx_dpo.adapters.layers import EMBEDDING_TYPES, EXPERT_TYPES, DoRAEmbedding, base_layer
from mlx_dpo.adapters.peft import PATH_PREFIXES
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
TRANSPOSED = {"gpt2"}  # linear layers whose weights lie as (in, out)
CHECKPOINT_PREFIXES = {"gpt2": ("model.", "")}  # as ROOTS, in checkpoint files
ROUTER_NAMES = ("gate", "router")  # in transformers bare parameters, beside experts
MIN_COSINE = 0.9  # cosine of a weight and the one it was quantised from: 2 bits give about 0.9


@dataclass(frozen=True)
class HFTensors:
    """The checkpoint's tensor for each adapted layer's path, and how PEFT is to find them."""

    tensors: dict[str, str]
    targets: list[str]  # PEFT's `target_modules`
    turned: frozenset[str]  # paths of the layers whose tensors lie as (in, out)

    def take(self, path: str, tensors: Arrays) -> mx.array:
        """A layer's weight as it is here, taken out, so that no more than one is held. (out, in)"""
        found = tensors.pop(self.tensors[path])
        return found.T if path in self.turned else found


def find_hf_tensors(
    model: nn.Module, entries: Mapping[str, Any], checkpoint: HFCheckpoint, *, whole: bool = False
) -> HFTensors:
    """The counterparts of a model's adapted layers; `entries` are those of `config.json`.

    For the `whole` checkpoint a tensor is enough, where PEFT wants a layer.

    Raises:
        ModelError: an adapted layer has none; says which and why.
    """
    kind = str(entries.get("model_type"))
    _check_model(model, kind, checkpoint)
    modules = dict(model.named_modules())
    tensors, turned = {}, set()
    for path, adapted in adapted_layers(model).items():
        layer = base_layer(adapted)
        _check_no_experts(path, layer)
        if not whole:
            _check_peft_can_adapt(model, modules, path, layer)
        tensors[path] = hf_tensor_name(f"{path}.weight", kind)
        shape = _weight_shape(layer)
        if kind in TRANSPOSED and not isinstance(layer, EMBEDDING_TYPES):
            shape = shape[::-1]
            turned.add(path)
        if (found := checkpoint.shapes.get(tensors[path])) != shape:
            there = f"it is {found} there" if found else "there is no tensor of that name"
            raise ModelError(
                f"`{path}`: {checkpoint.name} has no `{tensors[path]}` of shape {shape}: {there}"
            )
    return HFTensors(tensors, _target_modules(tensors, kind, checkpoint), frozenset(turned))


def hf_tensor_name(name: str, model_type: str) -> str:
    """The name in a checkpoint of a parameter that has this one here."""
    own, theirs = CHECKPOINT_PREFIXES.get(model_type, ("", ""))
    return theirs + name.removeprefix(own)


def check_same_weights(model: nn.Module, found: HFTensors, checkpoint: HFCheckpoint) -> None:
    """See that the checkpoint's weights are those that the adapters were trained on, or what they
    were quantised from; where its weights are here.

    Raises:
        ModelError: names a layer that has others.
    """
    there = checkpoint.tensors()
    for path, adapted in adapted_layers(model).items() if there else ():
        own = float32_weight(base_layer(adapted))
        other = found.take(path, there).astype(mx.float32)
        cosine = (own * other).sum() / mx.sqrt(mx.square(own).sum() * mx.square(other).sum())
        if not scalar(cosine) > MIN_COSINE:
            raise ModelError(
                f"{checkpoint.name}: `{path}` has other weights than the model that was trained on "
                f"(cosine {scalar(cosine):.2f}); name the checkpoint that it was made from"
            )


def _check_model(model: nn.Module, kind: str, checkpoint: HFCheckpoint) -> None:
    if get_fine_tune_type(model) == "full":
        raise ModelError(
            "weights of the model itself were trained, so there is no adapter; write the whole "
            "model with `mlx-dpo fuse --to hf`"
        )
    if kind not in SAME_LAYOUT:
        raise ModelError(
            f"layers of `{kind}` have not been held against those of transformers, or are others "
            "there"
        )
    if checkpoint.is_packed:
        raise ModelError(
            f"{checkpoint.name} was quantised by MLX, which transformers cannot read; name the "
            "Hugging Face checkpoint that it was made from with `--base` (of `mlx-dpo export` or "
            "`fuse`)"
        )


def _check_no_experts(path: str, layer: nn.Module) -> None:
    if isinstance(layer, EXPERT_TYPES):
        raise ModelError(
            f"`{path}` stacks the experts of a block, which lie one by one, or stacked otherwise, "
            "in a Hugging Face checkpoint"
        )


def _check_peft_can_adapt(
    model: nn.Module, modules: dict[str, nn.Module], path: str, layer: nn.Module
) -> None:
    parts = path.split(".")
    for end in range(1, len(parts)):
        holder = modules.get(".".join(parts[:end]))
        if parts[end] in ROUTER_NAMES and holder is not None and _holds_experts(holder):
            raise ModelError(
                f"`{path}` chooses among experts, and is no linear layer in transformers; leave it "
                "out with `lora_target_modules`"
            )
    if isinstance(modules[path], DoRAEmbedding):
        raise ModelError(
            f"`{path}`: DoRA stretches the rows of a table here and in mlx-lm, its columns in PEFT"
        )
    if isinstance(layer, EMBEDDING_TYPES) and has_tied_embeddings(model):
        raise ModelError(
            f"`{path}` is the head as well, and PEFT would adapt the table without the head"
        )


def _holds_experts(module: nn.Module) -> bool:
    return any(isinstance(child, EXPERT_TYPES) for child in module.modules())


def _weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """Of the weight as it is when unpacked. (out, in)"""
    rows, width = layer.weight.shape
    return rows, width * 32 // layer.bits if "scales" in layer else width


def _target_modules(tensors: Mapping[str, str], kind: str, checkpoint: HFCheckpoint) -> list[str]:
    """Last names where they mean the adapted layers and no others, else whole paths."""
    names = sorted({path.rpartition(".")[2] for path in tensors})
    ends = tuple(f".{name}.weight" for name in names)
    meant = {name for name in checkpoint.shapes if f".{name}".endswith(ends)}
    if meant == set(tensors.values()):
        return names
    own, theirs = PATH_PREFIXES.get(kind, ("", ""))
    return [theirs + path.removeprefix(own) for path in tensors]


def make_peft_adapter(
    model: nn.Module,
    entries: Mapping[str, Any],
    checkpoint: HFCheckpoint,
    *,
    rslora: bool = False,
    base_model: str | None = None,
    revision: str | None = None,
) -> tuple[dict[str, Any], Arrays]:
    """PEFT's settings and arrays of a model's adapters.

    Args:
        entries: Those of the base's `config.json`.
        checkpoint: On which names are proved.
        rslora: Whether the adapters' scale is alpha / sqrt(rank).
        base_model: The checkpoint's Hub id; a folder would mean nothing elsewhere.
        revision: Of the checkpoint on the Hub.

    Raises:
        ModelError: a layer has no counterpart in transformers.
    """
    found = find_hf_tensors(model, entries, checkpoint)
    check_same_weights(model, found, checkpoint)
    settings = peft_layout.make_peft_config(
        model, found.targets, rslora=rslora, transposed=bool(found.turned)
    )
    settings |= {"base_model_name_or_path": base_model, "revision": revision}
    return settings, peft_layout.make_peft_weights(model, str(entries["model_type"]))
