"""Weights of the model itself in training: float32 masters, computed with in their own type.

A step of AdamW is smaller than what bfloat16 tells apart, so it would be lost. The policy
therefore holds what is trained in float32, and each pass casts it to the type that it had:
then the untrained policy gives the base's numbers bit for bit.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_dpo.errors import ModelError
from mlx_dpo.io.arrays import named_arrays

ATTRIBUTE = "_masters"


@dataclass(frozen=True)
class _MasterWeights:
    """Beside a model whose own weights are trained: the types of those held wider than they were.

    An object, because MLX takes a dict among a module's attributes for parameters.
    """

    narrow: dict[str, mx.Dtype] = field(default_factory=dict)


def unfreeze_with_master_weights(model: nn.Module, names: Sequence[str]) -> None:
    """Let the parameters of these names be trained; whole numbers stay as they are.

    Raises:
        ModelError: one of them is packed.
    """
    modules = dict(model.named_modules())
    values = named_arrays(model.parameters())
    narrow: dict[str, mx.Dtype] = {}
    for name in names:
        owner, key = _owner_and_key(modules, name)
        if "scales" in modules[owner]:
            raise ModelError(
                f"fine_tune_type `full`: `{owner}` is quantised, and packed weights cannot move; "
                "take the model as it was before, or use `lora` or `dora`"
            )
        if not mx.issubdtype(values[name].dtype, mx.floating):
            continue
        modules[owner].unfreeze(recurse=False, keys=[key])
        if values[name].dtype != mx.float32:
            narrow[name] = values[name].dtype
    model.update(tree_unflatten([(k, values[k].astype(mx.float32)) for k in narrow]))
    setattr(model, ATTRIBUTE, _MasterWeights(narrow))


def _owner_and_key(modules: dict[str, nn.Module], name: str) -> tuple[str, str]:
    """The module that holds a parameter, and its key there, which may be that of a list."""
    parts = name.split(".")
    ends = range(len(parts) - 1, -1, -1)
    end = next(end for end in ends if ".".join(parts[:end]) in modules)
    return ".".join(parts[:end]), parts[end]


def drop_master_weights(model: nn.Module) -> None:
    """Take the model's weights, as they are now, for those of a base."""
    vars(model).pop(ATTRIBUTE, None)


def has_master_weights(model: nn.Module) -> bool:
    """Whether weights of the model itself are trained, or were."""
    return ATTRIBUTE in vars(model)


def forward_dtypes(model: nn.Module) -> set[mx.Dtype]:
    """The types in which masters are computed with, where those are narrower than they."""
    masters: _MasterWeights | None = vars(model).get(ATTRIBUTE)
    return set(masters.narrow.values()) if masters else set()


@contextmanager
def cast_for_forward(model: nn.Module) -> Iterator[None]:
    """Inside the block, what is trained is in the type that the base has it in."""
    masters: _MasterWeights | None = (
        vars(model).get(ATTRIBUTE) if isinstance(model, nn.Module) else None
    )
    if masters is None or not masters.narrow:
        yield
        return
    trained = named_arrays(model.trainable_parameters())
    held = {name: trained[name] for name in masters.narrow if name in trained}
    cast = [(name, value.astype(masters.narrow[name])) for name, value in held.items()]
    model.update(tree_unflatten(cast))
    try:
        yield
    finally:
        model.update(tree_unflatten(list(held.items())))


def cast_permanently(model: nn.Module) -> None:
    """Cast a policy that is not trained any further as `cast_for_forward` does, for good."""
    masters: _MasterWeights = vars(model)[ATTRIBUTE]
    values = named_arrays(model.parameters())
    model.update(tree_unflatten([(k, values[k].astype(t)) for k, t in masters.narrow.items()]))
    setattr(model, ATTRIBUTE, _MasterWeights())
