"""How weights are to be written: settings that must agree before a model is looked at."""

from dataclasses import dataclass

from mlx_lm.convert import QUANT_RECIPES

from mlx_dpo.errors import ConfigError
from mlx_dpo.policy.quantise import AFFINE_GROUP, AFFINE_GROUPS
from mlx_dpo.settings.model import BITS, DTYPES, MODES

RECIPES = tuple(QUANT_RECIPES)
FIXED = {"mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}  # mode: group size and bits


@dataclass(frozen=True)
class Packing:
    """Settings that agree with each other."""

    bits: int | None  # None: not quantised, or as the recipe says
    group_size: int
    mode: str
    recipe: str | None
    dtype: str | None  # None: as mlx-lm decides

    @property
    def quantises(self) -> bool:
        """Whether any layer is to be quantised."""
        return self.bits is not None or self.recipe is not None

    @property
    def groups(self) -> tuple[int, ...]:
        """The group sizes that the mode has."""
        return (self.group_size,) if self.mode in FIXED else AFFINE_GROUPS


def packing_of(
    bits: int | None,
    group_size: int | None,
    mode: str = "affine",
    recipe: str | None = None,
    dtype: str | None = None,
) -> Packing:
    """The settings as one value.

    Raises:
        ConfigError: one is unknown or without effect, or two contradict each other.
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
    if mode in FIXED:
        return _fixed(mode, bits, group_size, dtype)
    if group_size is not None and bits is None and recipe is None:
        raise ConfigError(
            "`group_size` has no effect without `bits` or `recipe`; the model is not quantised"
        )
    return Packing(bits, group_size or AFFINE_GROUP, mode, recipe, dtype)


def _check_recipe(recipe: str, bits: int | None, mode: str) -> None:
    if bits is not None:
        raise ConfigError(f"`bits` has no effect with `recipe`: `{recipe}` names its own")
    if mode != "affine":
        raise ConfigError(f"`recipe` needs the mode `affine`, got `{mode}`; leave one of them out")


def _fixed(mode: str, bits: int | None, group_size: int | None, dtype: str | None) -> Packing:
    """The only packing that `mode` has; it quantises whether or not `bits` is given."""
    only_group, only_bits = FIXED[mode]
    for name, value, only in (("bits", bits, only_bits), ("group_size", group_size, only_group)):
        if value is not None and value != only:
            raise ConfigError(f"`{name}` is {only} with the mode `{mode}`, got {value}")
    return Packing(only_bits, only_group, mode, None, dtype)
