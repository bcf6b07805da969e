"""Attaching adapters to a model in memory, disabling and detaching them, and their config.

What a policy has beyond its base model is either adapters on layers of the frozen base, or trained
weights of the base itself (mlx-lm's fine_tune_type `full`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_dpo.adapters import master_weights
from mlx_dpo.adapters.layers import (
    ADAPTER_TYPES,
    DORA_TYPES,
    AdapterType,
    adapter_dropout,
    adapter_rank,
    add_adapter,
    base_layer,
)
from mlx_dpo.adapters.targets import (
    adaptable_modules,
    block_paths,
    mlx_lm_keys,
    select_modules,
    trainable_modules,
)
from mlx_dpo.errors import ModelError, reason
from mlx_dpo.io.arrays import Arrays, named_arrays, read_arrays

FineTuneType = Literal["lora", "dora", "full"]


def attach_adapters(  # noqa: PLR0913 (one argument for each setting)
    model: nn.Module,
    *,
    rank: int,
    scale: float,
    dropout: float = 0.0,
    kind: AdapterType = "lora",
    target_modules: Sequence[str] = (),
    num_layers: int | None = None,
    seed: int = 0,
) -> list[str]:
    """Freeze the model and add new adapters to its last `num_layers` blocks.

    A new adapter changes nothing: A is drawn uniformly within 1/sqrt(in) as in PEFT, from `seed`,
    B is zero, and DoRA's magnitudes are those of the base. Without `target_modules` every linear
    layer of the blocks gets an adapter; experts, embeddings and heads have to be named.

    Returns:
        Names of the adapted layers: mlx-lm's `keys`.

    Raises:
        ConfigError: a target matches nothing, or there are fewer blocks than `num_layers`.
        ModelError: the model has adapters already, or a layer is of an unknown type.
    """
    paths = select_modules(model, adaptable_modules(model), target_modules, num_layers)
    mx.random.seed(seed % 2**64)
    attach_adapters_at(model, paths, kind=kind, rank=rank, scale=scale, dropout=dropout)
    return mlx_lm_keys(model, paths)[1]


def attach_adapters_at(
    model: nn.Module,
    paths: Sequence[str],
    *,
    kind: AdapterType,
    rank: int,
    scale: float,
    dropout: float,
) -> None:
    """Freeze the model and add new adapters to the layers at `paths`.

    Raises:
        ModelError, ConfigError: as `attach_adapters`.
    """
    _check_no_adapters(model)
    modules = dict(model.named_modules())
    model.freeze()
    adapted = [
        (path, add_adapter(modules[path], path, kind=kind, rank=rank, scale=scale, dropout=dropout))
        for path in paths
    ]
    model.update_modules(tree_unflatten(adapted))


def enable_full_fine_tuning(
    model: nn.Module, *, target_modules: Sequence[str] = (), num_layers: int | None = None
) -> None:
    """Unfreeze the weights of the last `num_layers` blocks, or of the target modules.

    Embeddings, head and final norm stay frozen unless they are named, as in mlx-lm.

    Raises:
        ConfigError: as `attach_adapters`.
        ModelError: the model has adapters, or a module is quantised.
    """
    paths = select_modules(model, trainable_modules(model), target_modules, num_layers)
    prefixes = tuple(f"{path}." for path in paths)
    names = [name for name in named_arrays(model.parameters()) if name.startswith(prefixes)]
    unfreeze_parameters(model, names)


def unfreeze_parameters(model: nn.Module, names: Sequence[str]) -> None:
    """Unfreeze the parameters with these names and freeze all others.

    Raises:
        ModelError: as `enable_full_fine_tuning`.
    """
    _check_no_adapters(model)
    model.freeze()
    master_weights.unfreeze_with_master_weights(model, names)


def _check_no_adapters(model: nn.Module) -> None:
    if adapted_layers(model) or master_weights.has_master_weights(model):
        raise ModelError("the model has adapters already; load it afresh to attach others")


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that have adapters, by path."""
    return {
        path: module for path, module in model.named_modules() if isinstance(module, ADAPTER_TYPES)
    }


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Replace the adapted layers by their base layers inside the block.

    The model then computes as the base, bit for bit. A scale of zero would still cost the adapters'
    matrix products and keep the names of their parameters.

    Raises:
        RuntimeError: weights of the base itself were trained, so that it has to be loaded again.
    """
    if master_weights.has_master_weights(model):
        raise RuntimeError("the base's own weights were trained: there is nothing to switch off")
    adapted = adapted_layers(model)
    detach_adapters(model)
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(list(adapted.items())))


def detach_adapters(model: nn.Module) -> None:
    """Remove the adapters from the model, so that others can be attached.

    Trained weights of the base itself stay as they are: a following adapter may continue from them.
    """
    master_weights.drop_master_weights(model)
    base_layers = [(path, base_layer(layer)) for path, layer in adapted_layers(model).items()]
    model.update_modules(tree_unflatten(base_layers))


def adapter_weights(model: nn.Module) -> Arrays:
    """Return the trainable parameters by name."""
    return named_arrays(model.trainable_parameters())


def get_fine_tune_type(model: nn.Module) -> FineTuneType:
    """Return how the policy differs from its base model."""
    if master_weights.has_master_weights(model):
        return "full"
    layers = adapted_layers(model).values()
    return "dora" if any(isinstance(layer, DORA_TYPES) for layer in layers) else "lora"


def make_adapter_config(model: nn.Module) -> dict[str, Any]:
    """Return the `adapter_config.json` by which mlx-lm attaches the same adapters to the base."""
    fine_tune_type, adapted = get_fine_tune_type(model), adapted_layers(model)
    if fine_tune_type == "full":
        return {"fine_tune_type": fine_tune_type, "num_layers": _count_trained_blocks(model)}
    layer = next(iter(adapted.values()))
    num_layers, keys = mlx_lm_keys(model, list(adapted))
    return {
        "fine_tune_type": fine_tune_type,
        "num_layers": num_layers,
        "lora_parameters": {
            "rank": adapter_rank(layer),
            "scale": layer.scale,
            "dropout": adapter_dropout(layer),
            "keys": keys,
        },
    }


def _count_trained_blocks(model: nn.Module) -> int:
    """Return the number of blocks from the first one with a trainable parameter to the last."""
    trained = named_arrays(model.trainable_parameters())
    blocks = block_paths(model)
    first = min(
        (i for i, b in enumerate(blocks) if any(name.startswith(b + ".") for name in trained)),
        default=0,
    )
    return len(blocks) - first


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter in memory; its weights have the names that they have in a policy."""

    path: Path  # of the weights
    fine_tune_type: FineTuneType
    weights: Arrays
    rank: int = 0
    scale: float = 0.0
    dropout: float = 0.0
    untied_embeddings: tuple[str, ...] = ()  # PEFT's names; a tied head does not use them


def read_adapter_weights(path: Path) -> Arrays:
    """Read the arrays of an adapter file.

    Raises:
        ModelError: the file is missing or damaged.
    """
    try:
        return read_arrays(path)[0]
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{path}: adapters cannot be read ({reason(error)})") from error
