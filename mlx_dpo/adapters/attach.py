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
from mlx_dpo.adapters.layers import ADAPTED, DORA, Kind, bare, dropout_of, rank_of, wrap
from mlx_dpo.adapters.targets import adaptable, block_paths, chosen, mlx_lm_keys, trainable
from mlx_dpo.errors import ModelError, reason
from mlx_dpo.io.arrays import Arrays, named_arrays, read_arrays

Way = Literal["lora", "dora", "full"]


def attach(  # noqa: PLR0913 (one argument for each setting)
    model: nn.Module,
    *,
    rank: int,
    scale: float,
    dropout: float = 0.0,
    kind: Kind = "lora",
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
    paths = chosen(model, adaptable(model), target_modules, num_layers)
    mx.random.seed(seed % 2**64)
    attach_at(model, paths, kind=kind, rank=rank, scale=scale, dropout=dropout)
    return mlx_lm_keys(model, paths)[1]


def attach_at(
    model: nn.Module, paths: Sequence[str], *, kind: Kind, rank: int, scale: float, dropout: float
) -> None:
    """Freeze the model and put fresh adapters on the layers at these paths.

    Raises:
        ModelError, ConfigError: as `attach`.
    """
    _refuse_second(model)
    modules = dict(model.named_modules())
    model.freeze()
    wrapped = [
        (path, wrap(modules[path], path, kind=kind, rank=rank, scale=scale, dropout=dropout))
        for path in paths
    ]
    model.update_modules(tree_unflatten(wrapped))


def attach_full(
    model: nn.Module, *, target_modules: Sequence[str] = (), num_layers: int | None = None
) -> None:
    """Let the weights of the last `num_layers` blocks be trained, or those of the named parts.

    Embeddings, head and last norm stay as they are unless named, as in mlx-lm.

    Raises:
        ConfigError: as `attach`.
        ModelError: the model has adapters, or a part is quantised.
    """
    parts = chosen(model, trainable(model), target_modules, num_layers)
    within = tuple(f"{part}." for part in parts)
    unfreeze(model, [name for name in named_arrays(model.parameters()) if name.startswith(within)])


def unfreeze(model: nn.Module, names: Sequence[str]) -> None:
    """Let the parameters of these names be trained, and no others.

    Raises:
        ModelError: as `attach_full`.
    """
    _refuse_second(model)
    model.freeze()
    masters.unfreeze(model, names)


def _refuse_second(model: nn.Module) -> None:
    if adapted_modules(model) or masters.has_masters(model):
        raise ModelError("the model has adapters already; load it afresh to attach others")


def adapted_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with adapters by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, ADAPTED)}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The bare base inside the block, bit for bit: the adapted layers are swapped out.

    Setting their scale to zero would still pay for the products and keep the names.

    Raises:
        RuntimeError: weights of the base itself were trained; it has to be loaded anew.
    """
    if masters.has_masters(model):
        raise RuntimeError("the base's own weights were trained: there is nothing to switch off")
    adapted = adapted_modules(model)
    detach(model)
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(list(adapted.items())))


def detach(model: nn.Module) -> None:
    """Make room for another adapter. Weights of the base that were trained stay as they are, for
    those of one that went on from them to take their place."""
    masters.forget(model)
    adapted = adapted_modules(model)
    model.update_modules(tree_unflatten([(path, bare(m)) for path, m in adapted.items()]))


def adapter_weights(model: nn.Module) -> Arrays:
    """What is trained, by name."""
    return named_arrays(model.trainable_parameters())


def way_of(model: nn.Module) -> Way:
    """How the policy differs from its base."""
    if masters.has_masters(model):
        return "full"
    found = adapted_modules(model).values()
    return "dora" if any(isinstance(module, DORA) for module in found) else "lora"


def description(model: nn.Module) -> dict[str, Any]:
    """What mlx-lm needs to put the same adapters on the same base."""
    way, adapted = way_of(model), adapted_modules(model)
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
    parameters = {"rank": rank_of(one), "scale": one.scale, "dropout": dropout_of(one)}
    return {
        "fine_tune_type": way,
        "num_layers": num_layers,
        "lora_parameters": {**parameters, "keys": keys},
    }


@dataclass(frozen=True)
class Saved:
    """An adapter that lies in memory; arrays are named as in a policy that has it attached."""

    where: Path  # of the weights
    way: Way
    weights: Arrays
    rank: int = 0
    scale: float = 0.0
    dropout: float = 0.0
    tables: tuple[str, ...] = ()  # whose adapters leave a head that is tied to them alone


def read_weights(path: Path) -> Arrays:
    """The arrays of a file of adapters.

    Raises:
        ModelError: there is no such file, or it is damaged.
    """
    try:
        return read_arrays(path)[0]
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{path}: adapters cannot be read ({reason(error)})") from error
