"""Quantising: which layers of a model can be, which were left, and what it makes of the size."""

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import utils as mlx_lm

from mlx_dpo.arrays import flat
from mlx_dpo.errors import ConfigError

AFFINE_GROUPS = (32, 64, 128)  # what MLX has for plain scales and biases
AFFINE_GROUP = 64  # the default


def quantise(
    model: nn.Module, config: dict[str, Any], bits: int, group_size: int | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Quantise `model` in place; its new configuration, and a note on layers left as they were.

    Raises:
        ConfigError: the model is quantised already, or the groups fit none of its layers.
    """
    group_size = group_size or AFFINE_GROUP
    check_quantisable(model, config, group_size, AFFINE_GROUPS)
    layers = len(quantisable(model))
    with redirect_stdout(io.StringIO()):  # mlx-lm prints its progress
        model, config = mlx_lm.quantize_model(model, config, group_size, bits)
    return config, left_note(model, layers, group_size)


def quantisable(model: nn.Module) -> dict[str, int]:
    """The layers that could be quantised and are not: their names and widths."""
    modules = model.named_modules()
    return {name: m.weight.shape[-1] for name, m in modules if hasattr(m, "to_quantized")}


def left_note(model: nn.Module, layers: int, group_size: int) -> tuple[str, ...]:
    """What to say of layers that quantising `model`, which had `layers`, left as they were."""
    widths = quantisable(model).values()
    unfit = sum(width % group_size != 0 for width in widths)
    notes = []
    if unfit:
        notes.append(
            f"{unfit} of {layers} layers left unquantised: "
            f"their width is no multiple of {group_size}"
        )
    if kept := len(widths) - unfit:
        notes.append(f"{kept} of {layers} layers left unquantised, as the model's own rule says")
    return tuple(notes)


def check_quantisable(
    model: nn.Module, config: dict[str, Any], group_size: int, groups: Sequence[int]
) -> None:
    """Refuse to quantise twice, and groups that MLX does not have or that fit no layer.

    Raises:
        ConfigError: one of these.
    """
    if config.get("quantization") or config.get("quantization_config"):
        raise ConfigError("`bits` has no effect: the model is quantised already; leave it out")
    if group_size not in groups:
        allowed = ", ".join(map(str, groups))
        raise ConfigError(f"`group_size` must be one of {allowed}, got {group_size}")
    widths = sorted(set(quantisable(model).values()))
    if not any(width % group_size == 0 for width in widths):
        found = ", ".join(map(str, widths)) or "none"
        raise ConfigError(
            f"`group_size` {group_size} fits no layer of this model (widths: {found}); "
            "take a smaller one"
        )


def expected_bytes(model: nn.Module, bits: int | None, group_size: int, dtype: str | None) -> int:
    """About how large the weights of `model` will be on disk."""
    fits = {f"{name}.weight" for name, w in quantisable(model).items() if w % group_size == 0}
    plain = getattr(mx, dtype).size if dtype else None
    total = 0.0
    for name, value in flat(model.parameters()).items():
        if bits is not None and name in fits:
            total += value.size * (bits + 64 / group_size) / 8  # a scale and a bias per group
        else:
            floating = mx.issubdtype(value.dtype, mx.floating)
            total += value.size * (plain if plain and floating else value.dtype.size)
    return int(total)
