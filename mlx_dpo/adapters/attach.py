"""Attach adapters to a model, disable or detach them, and make mlx-lm's adapter config.

A policy is either a frozen base model with adapters on some of its layers, or a model whose own
weights are trained by full fine-tuning (mlx-lm's fine_tune_type `full`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers import distributed
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
from mlx_dpo.io.arrays import Arrays, named_arrays
from mlx_dpo.io.checksums import read_checked_arrays
from mlx_dpo.models.sharded.shard_model import find_shards

# MLX's layers of which each process computes a part of the outputs, or of the sum.
TENSOR_PARALLEL_TYPES = (
    distributed.AllToShardedLinear,
    distributed.ShardedToAllLinear,
    distributed.QuantizedAllToShardedLinear,
    distributed.QuantizedShardedToAllLinear,
)

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

    The new adapters do not change the model's output: B is zero, and DoRA's magnitudes are the row
    norms of the base weights. A is drawn with `seed` from the uniform distribution between
    -1/sqrt(in) and 1/sqrt(in), as in PEFT. Without `target_modules`, every linear layer of these
    blocks gets an adapter; experts, embeddings and the LM head get adapters only if
    `target_modules` names them.

    Returns:
        Names of the adapted layers, for mlx-lm's setting `keys`.

    Raises:
        ConfigError: a target matches nothing, `num_layers` has no effect or exceeds the number of
            blocks, or mlx-lm has no DoRA for a layer.
        ModelError: the model already has adapters, or a layer's type cannot have one.
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
        ConfigError: mlx-lm has no DoRA for a layer.
        ModelError: the model already has adapters, or a layer's type cannot have one.
    """
    _check_no_adapters(model)
    modules = dict(model.named_modules())
    model.freeze()
    adapted = [
        (path, add_adapter(modules[path], path, kind=kind, rank=rank, scale=scale, dropout=dropout))
        for path in paths
    ]
    model.update_modules(tree_unflatten(adapted))
    _init_magnitudes_of_sharded_blocks(model)


def _init_magnitudes_of_sharded_blocks(model: nn.Module) -> None:
    """Set DoRA's magnitudes in blocks whose weights were not there when the layers were made.

    All ranks that hold parts of the model must do so.
    """
    if (shards := find_shards(model)) is None:
        return
    for block, shard in zip(shards.blocks, shards.shards, strict=True):
        layers = [module for module in block.modules() if isinstance(module, DORA_TYPES)]
        if not layers:
            continue
        with shard.unsharded():
            for layer in layers:
                layer.init_magnitude()
            mx.eval(
                [
                    [value for value in layer.values() if isinstance(value, mx.array)]
                    for layer in layers
                ]
            )


def enable_full_fine_tuning(
    model: nn.Module, *, target_modules: Sequence[str] = (), num_layers: int | None = None
) -> None:
    """Unfreeze the last `num_layers` blocks, or the target modules, and freeze all other weights.

    Inside the blocks, target modules are unfrozen only in the last `num_layers` blocks.
    Embeddings, LM head and final norm stay frozen unless `target_modules` names them, as in
    mlx-lm.

    Raises:
        ConfigError: a target matches nothing, or `num_layers` has no effect or exceeds the number
            of blocks.
        ModelError: the model has adapters already, or a selected module is quantized.
    """
    paths = select_modules(model, trainable_modules(model), target_modules, num_layers)
    prefixes = tuple(f"{path}." for path in paths)
    names = [name for name in named_arrays(model.parameters()) if name.startswith(prefixes)]
    unfreeze_parameters(model, names)


def unfreeze_parameters(model: nn.Module, names: Sequence[str]) -> None:
    """Unfreeze the parameters in `names`, hold them in float32, and freeze all other parameters.

    Raises:
        ModelError: the model has adapters already, or a parameter is quantized.
    """
    _check_no_adapters(model)
    if find_shards(model) is not None:
        raise ModelError(
            "fine_tune_type `full`: the weights are sharded (`shard_base`), which only frozen "
            "weights can be; use `lora` or `dora`"
        )
    model.freeze()
    master_weights.unfreeze_with_master_weights(model, names)


def _check_no_adapters(model: nn.Module) -> None:
    if names := [n for n, m in model.named_modules() if isinstance(m, TENSOR_PARALLEL_TYPES)]:
        raise ModelError(
            f"`{names[0]}` is divided among processes by tensor parallelism (`model.shard`), in "
            "which an adapter would silently compute wrong numbers; load the model without it"
        )
    if adapted_layers(model) or master_weights.has_master_weights(model):
        raise ModelError("the model already has adapters; load the model again to attach others")


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that have adapters, keyed by the layers' paths in the model."""
    return {
        path: module for path, module in model.named_modules() if isinstance(module, ADAPTER_TYPES)
    }


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Remove the adapters inside the `with` block and attach them again afterwards.

    Inside the block the model computes what its base computes, bit for bit. Setting the adapters'
    scale to zero instead would still cost their matrix products, and the adapters would stay among
    the model's parameters.

    Raises:
        RuntimeError: the model was fully fine-tuned, so its original base weights are gone.
    """
    if master_weights.has_master_weights(model):
        raise RuntimeError(
            "full fine-tuning changed the model's own weights, so there is no adapter to disable"
        )
    adapted = adapted_layers(model)
    detach_adapters(model)
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(list(adapted.items())))


def detach_adapters(model: nn.Module) -> None:
    """Remove the adapters from the model, so that other adapters can be attached.

    Fully fine-tuned weights keep their trained values and count as base weights from then on.
    """
    master_weights.drop_master_weights(model)
    base_layers = [(path, base_layer(layer)) for path, layer in adapted_layers(model).items()]
    model.update_modules(tree_unflatten(base_layers))


def adapter_weights(model: nn.Module) -> Arrays:
    """Return the trainable parameters (adapter or fully fine-tuned weights), keyed by name."""
    return named_arrays(model.trainable_parameters())


def get_fine_tune_type(model: nn.Module) -> FineTuneType:
    """Return mlx-lm's `fine_tune_type` of the model: `lora`, `dora` or `full`."""
    if master_weights.has_master_weights(model):
        return "full"
    layers = adapted_layers(model).values()
    return "dora" if any(isinstance(layer, DORA_TYPES) for layer in layers) else "lora"


def make_adapter_config(model: nn.Module) -> dict[str, Any]:
    """Return the content of the `adapter_config.json` that mlx-lm needs to load the adapters."""
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
    """Return the number of blocks from the first block with a trainable parameter to the end.

    The number is 0 if only modules outside of the blocks are trained.
    """
    trained = named_arrays(model.trainable_parameters())
    blocks = block_paths(model)
    first = min(
        (i for i, b in enumerate(blocks) if any(name.startswith(b + ".") for name in trained)),
        default=len(blocks),
    )
    return len(blocks) - first


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter that was read from its files but is not attached to a model yet."""

    path: Path  # the weight file
    fine_tune_type: FineTuneType
    weights: Arrays  # by path of the layer and mlx-lm's suffix, such as `.lora_a`
    rank: int = 0
    scale: float = 0.0
    dropout: float = 0.0
    untied_embeddings: tuple[str, ...] = ()  # their names in PEFT, which a tied head ignores


def read_adapter_weights(path: Path) -> Arrays:
    """Return the arrays of a safetensors file with adapter weights, keyed by name.

    Raises:
        DamagedFileError: the file does not match its checksum.
        ModelError: the file is missing, or is not a safetensors file.
    """
    try:
        return read_checked_arrays(path)[0]
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{path}: adapters cannot be read ({reason(error)})") from error
