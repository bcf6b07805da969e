"""LoRA on a frozen base: attach, switch off, save, load.

The files are mlx-lm's own (`adapters.safetensors`, `adapter_config.json`), so that
`mlx_lm.load(adapter_path=...)` reads them. Adapters stay float32, whatever the base is:
bfloat16 would swallow updates a thousandth of a weight's size.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tuner import lora

from mlx_dpo.arrays import Arrays, flat, read_arrays, write_arrays
from mlx_dpo.errors import ConfigError, ModelError, reason
from mlx_dpo.policy.low_rank import add_low_rank

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"


class LoRALinear(lora.LoRALinear):
    """mlx-lm's LoRA layer, with its products in the number type of the activations.

    Float32 factors would promote every activation that passes through them.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """x W + scale (dropout(x) A) B. (..., in) -> (..., out)"""
        a, b = self.lora_a.astype(x.dtype), self.lora_b.astype(x.dtype)
        return add_low_rank(self.linear(x), self.dropout(x), a, b, self.scale)


def linear_names(model: nn.Module) -> list[str]:
    """Paths of the linear layers inside the blocks, relative to their block, without repeats."""
    names: dict[str, None] = {}
    for layer in model.layers:
        for path, module in layer.named_modules():
            if isinstance(module, nn.Linear | nn.QuantizedLinear):
                names[path] = None
    return list(names)


def chosen_names(model: nn.Module, target_modules: Sequence[str]) -> list[str]:
    """The linear layers that `target_modules` name, all of them if it is empty.

    A target is a whole path inside a block (`self_attn.q_proj`) or its last part (`q_proj`).

    Raises:
        ConfigError: a target matches no linear layer; the ones there are are named.
    """
    names = linear_names(model)
    for target in target_modules:
        if not any(_matches(name, target) for name in names):
            raise ConfigError(
                f"`lora_target_modules`: `{target}` matches no linear layer of this model; "
                f"it has {', '.join(sorted(names))}"
            )
    targets = target_modules or names
    return [name for name in names if any(_matches(name, target) for target in targets)]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def attach(
    model: nn.Module,
    *,
    rank: int,
    scale: float,
    dropout: float = 0.0,
    target_modules: Sequence[str] = (),
    num_layers: int | None = None,
    seed: int = 0,
) -> list[str]:
    """Freeze the model and put fresh adapters on its last `num_layers` blocks.

    A fresh adapter changes nothing: A is drawn uniformly within 1/sqrt(in) as PEFT does,
    from `seed`, and B is zero.

    Returns:
        Names of the adapted layers, relative to a block: mlx-lm's `keys`.

    Raises:
        ConfigError: a target matches nothing, or there are fewer blocks than `num_layers`.
        ModelError: the model has adapters already.
    """
    if adapted_modules(model):
        raise ModelError("the model has adapters already; load it afresh to attach others")
    blocks = len(model.layers)
    if num_layers is not None and num_layers > blocks:
        raise ConfigError(f"`num_layers` is {num_layers}, but the model has {blocks} layers")
    keys = chosen_names(model, target_modules)
    model.freeze()
    mx.random.seed(seed % 2**64)
    for layer in model.layers[blocks - (num_layers or blocks) :]:
        wrapped = [
            (path, _wrap(module, rank=rank, scale=scale, dropout=dropout))
            for path, module in layer.named_modules()
            if path in keys
        ]
        layer.update_modules(tree_unflatten(wrapped))
    return keys


def _wrap(module: nn.Module, *, rank: int, scale: float, dropout: float) -> LoRALinear:
    if type(module) not in (nn.Linear, nn.QuantizedLinear):
        raise ModelError(f"no adapter is known for a layer of type `{type(module).__name__}`")
    output_dims, input_dims = module.weight.shape
    if isinstance(module, nn.QuantizedLinear):
        input_dims = input_dims * 32 // module.bits
    # The constructor makes a dense layer first; lazily, so that it is never allocated.
    adapted = LoRALinear(input_dims, output_dims, r=rank, dropout=dropout, scale=scale)
    adapted.linear = module
    return adapted


def adapted_modules(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by path."""
    return {
        path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)
    }


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The bare base inside the block, bit for bit: the adapted layers are swapped out.

    Setting their scale to zero would still pay for the products and keep the names.
    """
    adapted = adapted_modules(model)
    model.update_modules(tree_unflatten([(k, m.linear) for k, m in adapted.items()]))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(list(adapted.items())))


def adapter_weights(model: nn.Module) -> Arrays:
    """What is trained, by name."""
    return flat(model.trainable_parameters())


def adapter_config(
    *, keys: Sequence[str], rank: int, scale: float, dropout: float, num_layers: int
) -> dict[str, Any]:
    """What mlx-lm needs to put the same adapters on the same base."""
    return {
        "fine_tune_type": "lora",
        "num_layers": num_layers,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": dropout, "keys": list(keys)},
    }


def save_adapter(folder: Path, model: nn.Module, config: dict[str, Any]) -> None:
    """Write weights and config into `folder`, each whole or not at all, weights last."""
    partial = folder / f"partial-{WEIGHTS}"  # mlx insists on the ending
    (folder / f"partial-{CONFIG}").write_text(json.dumps(config, indent=2) + "\n")
    write_arrays(partial, adapter_weights(model), {"format": "mlx"})
    os.replace(folder / f"partial-{CONFIG}", folder / CONFIG)
    os.replace(partial, folder / WEIGHTS)


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Attach the adapters that `folder` describes and load their weights. Frozen afterwards.

    Raises:
        ModelError: a file is missing or not of the layout, or fits another model.
    """
    config = read_adapter_config(folder)
    parameters = config["lora_parameters"]
    attach(
        model,
        rank=parameters["rank"],
        scale=parameters["scale"],
        dropout=parameters["dropout"],
        target_modules=parameters.get("keys") or (),
        num_layers=min(config["num_layers"], len(model.layers)),
    )
    load_adapter_weights(model, folder / WEIGHTS)
    model.freeze()
    model.eval()


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter's description, checked for what `load_adapter` reads."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
        parameters = config["lora_parameters"]
        missing = {"rank", "scale", "dropout"} - parameters.keys() or {"num_layers"} - config.keys()
    except FileNotFoundError:
        raise ModelError(f"{folder}: no `{CONFIG}`; is it an adapter or a run folder?") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ModelError(f"{path}: not an adapter description in mlx-lm's layout") from None
    if missing:
        raise ModelError(f"{path}: missing `{min(missing)}`")
    if (kind := config.get("fine_tune_type", "lora")) != "lora":
        raise ModelError(f"{path}: fine_tune_type `{kind}` cannot be loaded here, only `lora`")
    return dict(config)


def load_adapter_weights(model: nn.Module, path: Path) -> None:
    """Load saved weights into attached adapters; names and shapes have to agree exactly."""
    try:
        saved, _ = read_arrays(path)
    except (FileNotFoundError, RuntimeError) as error:
        raise ModelError(f"{path}: adapters cannot be read ({reason(error)})") from error
    wanted = {name: value.shape for name, value in adapter_weights(model).items()}
    found = {name: value.shape for name, value in saved.items()}
    if wanted != found:
        names = {name for name in wanted | found if wanted.get(name) != found.get(name)}
        name = min(names)
        raise ModelError(
            f"{path}: adapters of another model; `{name}` is {found.get(name, 'absent')} there "
            f"and {wanted.get(name, 'absent')} here"
        )
    model.load_weights(list(saved.items()), strict=False)  # strict would want the base as well
