"""What training moves and what it is held against, in lines for a person."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import mlx.nn as nn

from mlx_dpo.arrays import flat
from mlx_dpo.config import DPOConfig
from mlx_dpo.policy import memory
from mlx_dpo.policy.adapters import adapted_modules, way_of
from mlx_dpo.policy.device import dtype_name
from mlx_dpo.policy.layers import LoRAEmbedding, LoRASwitchLinear, rank_of
from mlx_dpo.policy.masters import narrow_types
from mlx_dpo.policy.targets import block_paths, is_tied

TABLE = "the embeddings"

Fact = tuple[str, str]


def reference(policy: nn.Module, config: DPOConfig) -> str:
    """What the policy is held against."""
    if not config.needs_reference:
        return "none: the loss needs none"
    if config.reference_model is not None:
        return f"{config.reference_model}, asked once before the policy was loaded, and freed"
    if config.start_adapter is not None:
        what = f"with the adapter of {config.start_adapter}"
    else:
        what = "before it is trained" if way_of(policy) == "full" else "without adapters"
    if config.sync_ref_model:
        return (
            f"the model {what}; every {config.sync_steps} steps it moves "
            f"{config.mixup_alpha:.0%} of the way to the policy, and a step then asks it anew"
        )
    return f"the model {what}, scored once before the first step"


def trained(policy: nn.Module, config: DPOConfig, entries: Mapping[str, Any]) -> list[Fact]:
    """What training moves, how much that is, and what follows from it.

    `entries` are those of the base's `config.json`.
    """
    count, moved = memory.base_parameters(policy), memory.trainable_parameters(policy)
    share = f"{counted(moved)} parameters trained, {moved / count:.2%} of the model"
    if way_of(policy) == "full":
        narrow = " and ".join(sorted(dtype_name(dtype) for dtype in narrow_types(policy)))
        note = ("", f"held in float32, computed with in {narrow}")
        what = f"full fine-tuning, in {_parts(policy)}: {share}"
        return [("weights", what), *[note] * bool(narrow)]
    lines = [("adapters", f"{_sizes(policy, config)}: {share}")]
    if any(isinstance(module, LoRAEmbedding) for module in adapted_modules(policy).values()):
        note = ("", "the head is the embeddings turned round, and adapted with them")
        lines += [note] * is_tied(policy)
    if unread := _unread_by_mlx_lm(policy, entries):
        lines.append(("", f"mlx-lm itself cannot load DoRA on {unread}; mlx-dpo can"))
    return lines


def _unread_by_mlx_lm(policy: nn.Module, entries: Mapping[str, Any]) -> str | None:
    """Layers that its own DoRA takes for narrower than they are."""
    packed = entries.get("quantization") or {}
    if way_of(policy) != "dora" or not packed:
        return None
    kinds = {_kind(module) for module in adapted_modules(policy).values()}
    if TABLE in kinds:
        return "packed embeddings"
    return f"{packed['bits']}-bit layers" if packed["bits"] not in (2, 4, 8) else None


def _sizes(policy: nn.Module, config: DPOConfig) -> str:
    adapted = adapted_modules(policy)
    kinds = Counter(_kind(module) for module in adapted.values())
    layers = " and ".join(f"{number} {kind}" for kind, number in kinds.items() if kind != TABLE)
    layers += f"{' and ' * bool(layers)}{TABLE}" * (TABLE in kinds)
    one = next(iter(adapted.values()))
    rank, rooted = rank_of(one), config.start_adapter is None and config.use_rslora
    alpha = f"{config.alpha:g} / sqrt(rank)" if rooted else f"{one.scale * rank:g}"
    way = "DoRA" if way_of(policy) == "dora" else "LoRA"
    return f"{way}, rank {rank}, alpha {alpha} on {layers}"


def _kind(module: nn.Module) -> str:
    if isinstance(module, LoRASwitchLinear):
        return "layers of experts"
    return TABLE if isinstance(module, LoRAEmbedding) else "linear layers"


def _parts(policy: nn.Module) -> str:
    """The blocks whose own weights are trained, and what is outside of them."""
    names, paths = flat(policy.trainable_parameters()), block_paths(policy)
    blocks = sum(any(name.startswith(f"{path}.") for name in names) for path in paths)
    inside = tuple(f"{path}." for path in paths)
    outside = sorted({n.rpartition(".")[0] for n in names if not n.startswith(inside)})
    return " and ".join([f"{blocks} of {len(paths)} blocks"] * bool(blocks) + outside)


def counted(number: int) -> str:
    """A number with three digits and a letter for thousands, millions, billions."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
