"""Quantize models, check quantization settings, and estimate the resulting size on disk."""

import io
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import utils as mlx_lm
from mlx_lm.convert import QUANT_RECIPES

from mlx_dpo.config.model import BITS, DTYPES, MODES
from mlx_dpo.errors import ConfigError
from mlx_dpo.io.arrays import named_arrays

AFFINE_GROUP_SIZES = (32, 64, 128)  # that MLX supports in the affine mode
DEFAULT_GROUP_SIZE = 64  # the default


def quantize_model(
    model: nn.Module, config: dict[str, Any], bits: int, group_size: int | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Quantize `model` in place.

    Returns:
        New configuration of the model, and notes on layers that were left unquantized.

    Raises:
        ConfigError: the model is quantized already, or the group size is not supported, or no
            layer has a width that is a multiple of the group size.
    """
    group_size = group_size or DEFAULT_GROUP_SIZE
    check_quantizable(model, config, group_size, AFFINE_GROUP_SIZES)
    layers = len(quantizable_layers(model))
    with redirect_stdout(io.StringIO()):  # mlx-lm prints its progress
        model, config = mlx_lm.quantize_model(model, config, group_size, bits)
    return config, unquantized_notes(model, layers, group_size)


def quantizable_layers(model: nn.Module) -> dict[str, int]:
    """Return the width of each layer that is not quantized but can be, keyed by layer name.

    The width is the number of inputs, which must be a multiple of the group size.
    """
    modules = model.named_modules()
    return {name: m.weight.shape[-1] for name, m in modules if hasattr(m, "to_quantized")}


def unquantized_notes(
    model: nn.Module,
    layers: int,
    group_size: int,
    group_sizes: Sequence[int] = AFFINE_GROUP_SIZES,
) -> tuple[str, ...]:
    """Return notes on how many quantizable layers were left unquantized, and why.

    Args:
        layers: Number of layers that were quantizable before quantization.
        group_sizes: Group sizes that MLX supports in the mode of quantization.
    """
    widths = list(quantizable_layers(model).values())
    unfit = [width for width in widths if width % group_size != 0]
    notes = []
    if unfit:
        notes.append(
            f"{len(unfit)} of {layers} layers left unquantized: their width ({_listed(unfit)}) is "
            f"not a multiple of {group_size}; {_fitting_group_size(unfit, group_sizes)}"
        )
    if excluded := len(widths) - len(unfit):
        notes.append(
            f"{excluded} of {layers} layers left unquantized, as the model's own configuration "
            "requires"
        )
    return tuple(notes)


def unfit_notes(model: nn.Module, group_size: int) -> tuple[str, ...]:
    """Return a note on the layers that affine quantization will leave out because of their width.

    Args:
        model: Model that is not quantized yet.
    """
    widths = quantizable_layers(model).values()
    unfit = [width for width in widths if width % group_size != 0]
    if not unfit:
        return ()
    return (
        f"{len(unfit)} of {len(widths)} layers stay unquantized: their width ({_listed(unfit)}) "
        f"is not a multiple of {group_size}; {_fitting_group_size(unfit, AFFINE_GROUP_SIZES)}",
    )


def _fitting_group_size(widths: Sequence[int], group_sizes: Sequence[int]) -> str:
    """Return advice on the group size that fits most of the layers with these widths."""
    counts = {size: sum(width % size == 0 for width in widths) for size in sorted(group_sizes)}
    best = max(counts, key=lambda size: (counts[size], size))
    if not counts[best]:
        return f"none of the supported group sizes ({_listed(group_sizes)}) divides them"
    share = "all" if counts[best] == len(widths) else f"{counts[best]}"
    return f"group size {best} fits {share} of them (--group-size {best})"


def _listed(numbers: Iterable[int]) -> str:
    """Return the different numbers in order, as text."""
    return ", ".join(map(str, sorted(set(numbers))))


def check_quantizable(
    model: nn.Module, config: dict[str, Any], group_size: int, group_sizes: Sequence[int]
) -> None:
    """Check that the model can be quantized with this group size.

    Args:
        group_sizes: Group sizes that MLX supports.

    Raises:
        ConfigError: the model is quantized already, or the group size is not supported, or no
            layer has a width that is a multiple of the group size.
    """
    if config.get("quantization") or config.get("quantization_config"):
        raise ConfigError("`bits` has no effect: the model is quantized already; leave it out")
    if group_size not in group_sizes:
        allowed = ", ".join(map(str, group_sizes))
        raise ConfigError(f"`group_size` must be one of {allowed}, got {group_size}")
    widths = list(quantizable_layers(model).values())
    if not any(width % group_size == 0 for width in widths):
        raise ConfigError(
            f"`group_size` {group_size} fits no layer of this model (widths: "
            f"{_listed(widths) or 'none'}); {_fitting_group_size(widths, group_sizes)}"
        )


def expected_bytes(
    model: nn.Module,
    bits: int | None,
    group_size: int,
    dtype: str | None,
    *,
    mode: str = "affine",
) -> int:
    """Return the approximate size in bytes of the model's weights on disk.

    Args:
        bits: Bits per weight of the quantized layers; None if the model is not quantized.
        dtype: Dtype of the other weights and of affine scales; None for their present dtype.
        mode: Mode of quantization.
    """
    fits = {
        f"{name}.weight" for name, w in quantizable_layers(model).items() if w % group_size == 0
    }
    plain = getattr(mx, dtype).size if dtype else None
    total = 0.0
    for name, value in named_arrays(model.parameters()).items():
        floating = mx.issubdtype(value.dtype, mx.floating)
        size = plain if plain and floating else value.dtype.size
        if bits is not None and name in fits:
            # Per group: a scale and a bias in the weights' dtype, or a scale of 8 bits.
            extra = 16 * size if mode == "affine" else 8
            total += value.size * (bits + extra / group_size) / 8
        else:
            total += value.size * size
    return int(total)


RECIPES = tuple(QUANT_RECIPES)
FIXED_MODES = {"mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}  # mode: group size and bits


@dataclass(frozen=True)
class QuantizationConfig:
    """Checked settings of a conversion: quantization and dtype of the weights."""

    bits: int | None  # None: not quantized, or set by the recipe
    group_size: int
    mode: str
    recipe: str | None
    dtype: str | None  # None: mlx-lm decides

    @property
    def is_quantized(self) -> bool:
        """Whether the model is going to be quantized."""
        return self.bits is not None or self.recipe is not None

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """The group sizes that the quantization mode supports."""
        return (self.group_size,) if self.mode in FIXED_MODES else AFFINE_GROUP_SIZES


def make_quantization_config(
    bits: int | None,
    group_size: int | None,
    mode: str = "affine",
    recipe: str | None = None,
    dtype: str | None = None,
) -> QuantizationConfig:
    """Check the settings of a conversion and return them as a `QuantizationConfig`.

    Raises:
        ConfigError: a setting is unknown or has no effect, or two settings contradict each other.
    """
    for name, value, known in (
        ("bits", bits, BITS),
        ("mode", mode, MODES),
        ("recipe", recipe, RECIPES),
        ("dtype", dtype, DTYPES),
    ):
        if value is not None and value not in known:
            allowed = ", ".join(map(str, known))
            raise ConfigError(f"`{name}` must be one of {allowed}, got {value!r}")
    if recipe is not None:
        _check_recipe(recipe, bits, mode)
    if mode in FIXED_MODES:
        return _fixed_mode_config(mode, bits, group_size, dtype)
    if group_size is not None and bits is None and recipe is None:
        raise ConfigError(
            "`group_size` has no effect without `bits` or `recipe`; the model is not quantized"
        )
    return QuantizationConfig(bits, group_size or DEFAULT_GROUP_SIZE, mode, recipe, dtype)


def _check_recipe(recipe: str, bits: int | None, mode: str) -> None:
    if bits is not None:
        raise ConfigError(f"`bits` has no effect with `recipe`: `{recipe}` names its own")
    if mode != "affine":
        raise ConfigError(f"`recipe` needs the mode `affine`, got `{mode}`; leave out one of them")


def _fixed_mode_config(
    mode: str, bits: int | None, group_size: int | None, dtype: str | None
) -> QuantizationConfig:
    """Return the settings of a mode whose bits and group size are fixed, such as `mxfp4`.

    Raises:
        ConfigError: `bits` or `group_size` is given and differs from the fixed value.
    """
    only_group, only_bits = FIXED_MODES[mode]
    for name, value, only in (("bits", bits, only_bits), ("group_size", group_size, only_group)):
        if value is not None and value != only:
            raise ConfigError(f"`{name}` is {only} with the mode `{mode}`, got {value}")
    return QuantizationConfig(only_bits, only_group, mode, None, dtype)
