"""Hold the weights of full fine-tuning in float32, and cast them for each forward pass.

A step of AdamW is smaller than the spacing of bfloat16 numbers and would be lost. Trained weights
are therefore held in float32 (master weights), and each forward pass casts them to the dtype that
they had in the base model. Before training, the policy thus computes what the base computes, bit
for bit.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_dpo.errors import ModelError
from mlx_dpo.io.arrays import named_arrays

ATTRIBUTE = "_master_weights"  # of a model that has them


@dataclass(frozen=True)
class _MasterWeights:
    """The original dtype of each weight that is held in float32, keyed by parameter name.

    This is a class because MLX would count a dict among a module's attributes as parameters.
    """

    base_dtypes: dict[str, mx.Dtype] = field(default_factory=dict)


def unfreeze_with_master_weights(model: nn.Module, names: Sequence[str]) -> None:
    """Unfreeze the parameters in `names` and cast them to float32; skip integer parameters.

    Raises:
        ModelError: a parameter is quantized.
    """
    modules = dict(model.named_modules())
    values = named_arrays(model.parameters())
    base_dtypes: dict[str, mx.Dtype] = {}
    for name in names:
        owner, key = _owner_and_key(modules, name)
        if "scales" in modules[owner]:
            raise ModelError(
                f"fine_tune_type `full`: `{owner}` is quantized, and quantized weights cannot be "
                "trained; use the unquantized model, or `lora` or `dora`"
            )
        if not mx.issubdtype(values[name].dtype, mx.floating):
            continue
        modules[owner].unfreeze(recurse=False, keys=[key])
        if values[name].dtype != mx.float32:
            base_dtypes[name] = values[name].dtype
    model.update(tree_unflatten([(k, values[k].astype(mx.float32)) for k in base_dtypes]))
    setattr(model, ATTRIBUTE, _MasterWeights(base_dtypes))


def _owner_and_key(modules: dict[str, nn.Module], name: str) -> tuple[str, str]:
    """Return the path of the module that holds the parameter `name`, and the parameter's key there.

    If the parameter is an element of a list, the key is that of the list.
    """
    parts = name.split(".")
    ends = range(len(parts) - 1, -1, -1)
    end = next(end for end in ends if ".".join(parts[:end]) in modules)
    return ".".join(parts[:end]), parts[end]


def drop_master_weights(model: nn.Module) -> None:
    """Treat the current weights as base weights, as if the model had not been fully fine-tuned."""
    vars(model).pop(ATTRIBUTE, None)


def has_master_weights(model: nn.Module) -> bool:
    """Return whether the model's own weights are or were trained (full fine-tuning)."""
    return ATTRIBUTE in vars(model)


def forward_dtypes(model: nn.Module) -> set[mx.Dtype]:
    """Return the dtypes narrower than float32 to which a forward pass casts master weights."""
    masters: _MasterWeights | None = vars(model).get(ATTRIBUTE)
    return set(masters.base_dtypes.values()) if masters else set()


@contextmanager
def cast_for_forward(model: nn.Module) -> Iterator[None]:
    """Cast the master weights to their dtypes in the base model inside the `with` block.

    The float32 values are restored afterwards.
    """
    is_module = isinstance(model, nn.Module)
    masters: _MasterWeights | None = vars(model).get(ATTRIBUTE) if is_module else None
    if masters is None or not masters.base_dtypes:
        yield
        return
    trained = named_arrays(model.trainable_parameters())
    float32 = {name: trained[name] for name in masters.base_dtypes if name in trained}
    cast = [(name, value.astype(masters.base_dtypes[name])) for name, value in float32.items()]
    model.update(tree_unflatten(cast))
    try:
        yield
    finally:
        model.update(tree_unflatten(list(float32.items())))


def cast_permanently(model: nn.Module) -> None:
    """Cast the master weights to their dtypes in the base model, once training has ended."""
    masters: _MasterWeights = vars(model)[ATTRIBUTE]
    values = named_arrays(model.parameters())
    cast = [(k, values[k].astype(dtype)) for k, dtype in masters.base_dtypes.items()]
    model.update(tree_unflatten(cast))
    setattr(model, ATTRIBUTE, _MasterWeights())
