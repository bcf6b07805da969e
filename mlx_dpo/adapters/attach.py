"""What a policy has beyond its base: attach it, switch it off, take it off, describe it.

Either adapters beside layers of a frozen base, or weights of the base itself that are trained
(mlx-lm's fine_tune_type `full`). Knows no files.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_dpo.adapters import master_weights as masters
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
    """Freeze the model and put fresh adapters on its last `num_layers` blocks.

    A fresh adapter changes nothing: A is drawn uniformly within 1/sqrt(in) as PEFT does, from
    `seed`, B is zero, and magnitudes are those of the base. Without `target_modules` every
    linear layer of the blocks has one; experts, embeddings and heads have to be named.

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
    """Freeze the model and put fresh adapters on the layers at these paths.

    Raises:
        ModelError, ConfigError: as `attach`.
    """
    _check_no_adapters(model)
    modules = dict(model.named_modules())
    model.freeze()
    wrapped = [
        (path, add_adapter(modules[path], path, kind=kind, rank=rank, scale=scale, dropout=dropout))
        for path in paths
    ]
    model.update_modules(tree_unflatten(wrapped))


def enable_full_fine_tuning(
    model: nn.Module, *, target_modules: Sequence[str] = (), num_layers: int | None = None
) -> None:
    """Let the weights of the last `num_layers` blocks be trained, or those of the named parts.

    Embeddings, head and last norm stay as they are unless named, as in mlx-lm.

    Raises:
        ConfigError: as `attach`.
        ModelError: the model has adapters, or a part is quantised.
    """
    parts = select_modules(model, trainable_modules(model), target_modules, num_layers)
    within = tuple(f"{part}." for part in parts)
    unfreeze_parameters(
        model, [name for name in named_arrays(model.parameters()) if name.startswith(within)]
    )


def unfreeze_parameters(model: nn.Module, names: Sequence[str]) -> None:
    """Let the parameters of these names be trained, and no others.

    Raises:
        ModelError: as `enable_full_fine_tuning`.
    """
    _check_no_adapters(model)
    model.freeze()
    masters.unfreeze_with_master_weights(model, names)


def _check_no_adapters(model: nn.Module) -> None:
    if adapted_layers(model) or masters.has_master_weights(model):
        raise ModelError("the model has adapters already; load it afresh to attach others")


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with adapters by path."""
    return {
        path: module for path, module in model.named_modules() if isinstance(module, ADAPTER_TYPES)
    }


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """The bare base inside the block, bit for bit: the adapted layers are swapped out.

    Setting their scale to zero would still pay for the products and keep the names.

    Raises:
        RuntimeError: weights of the base itself were trained; it has to be loaded anew.
    """
    if masters.has_master_weights(model):
        raise RuntimeError("the base's own weights were trained: there is nothing to switch off")
    adapted = adapted_layers(model)
    detach_adapters(model)
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(list(adapted.items())))


def detach_adapters(model: nn.Module) -> None:
    """Make room for another adapter. Weights of the base that were trained stay as they are, for
    those of one that went on from them to take their place."""
    masters.drop_master_weights(model)
    adapted = adapted_layers(model)
    model.update_modules(tree_unflatten([(path, base_layer(m)) for path, m in adapted.items()]))


def adapter_weights(model: nn.Module) -> Arrays:
    """What is trained, by name."""
    return named_arrays(model.trainable_parameters())


def get_fine_tune_type(model: nn.Module) -> FineTuneType:
    """How the policy differs from its base."""
    if masters.has_master_weights(model):
        return "full"
    found = adapted_layers(model).values()
    return "dora" if any(isinstance(module, DORA_TYPES) for module in found) else "lora"


def make_adapter_config(model: nn.Module) -> dict[str, Any]:
    """What mlx-lm needs to put the same adapters on the same base."""
    way, adapted = get_fine_tune_type(model), adapted_layers(model)
    if way == "full":
        trained = named_arrays(model.trainable_parameters())
        blocks = block_paths(model)
        first = min(
            (i for i, b in enumerate(blocks) if any(name.startswith(b + ".") for name in trained)),
            default=0,
        )
        return {"fine_tune_type": way, "num_layers": len(blocks) - first}
    one = next(iter(adapted.values()))
    num_layers, keys = mlx_lm_keys(model, list(adapted))
    parameters = {"rank": adapter_rank(one), "scale": one.scale, "dropout": adapter_dropout(one)}
    return {
        "fine_tune_type": way,
        "num_layers": num_layers,
        "lora_parameters": {**parameters, "keys": keys},
    }


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter that lies in memory; arrays are named as in a policy that has it attached."""

    where: Path  # of the weights
    way: FineTuneType
    weights: Arrays
    rank: int = 0
    scale: float = 0.0
    dropout: float = 0.0
    tables: tuple[str, ...] = ()  # whose adapters leave a head that is tied to them alone


def read_adapter_weights(path: Path) -> Arrays:
    """The arrays of a file of adapters.

    Raises:
        ModelError: there is no such file, or it is damaged.
    """
    try:
        return read_arrays(path)[0]
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{path}: adapters cannot be read ({reason(error)})") from error
