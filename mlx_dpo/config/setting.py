"""Declare settings (default, help, type, bounds), and check their values and combinations."""

import math
import os
import reprlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Generic, TypeVar

from mlx_dpo.errors import ConfigError

S = TypeVar("S", contravariant=True)
MAX_INT, MAX_FLOAT = 2**31 - 1, 1e30  # of a setting without a maximum; arrays hold no more
MAX_SHOWN = 80  # characters of a value in an error message


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Declaration of a setting, from which its CLI flag, YAML key and documentation are made."""

    default: Any
    help: str
    type: type
    section: str
    minimum: float = -math.inf
    maximum: float = math.inf
    exclusive_minimum: bool = False  # the value must be above the minimum
    exclusive_maximum: bool = False
    choices: tuple[Any, ...] = ()
    is_list: bool = False
    is_path: bool = False  # `~` is expanded to the home folder, as a shell does
    changes_result: bool = True  # a resumed run must have the same value
    metavar: str = ""  # what the value is, in help texts: MODEL, FILE, N
    default_text: str = ""  # what the default is, where it is not a value: "by loss"
    essential: bool = False  # in the short help of `train`, `plan` and `loop`
    required: bool = False

    @property
    def is_optional(self) -> bool:
        """Whether the value may be None, which means "not set"."""
        return self.default is None

    @property
    def shown_default(self) -> str:
        """The default as help texts and documentation show it; "" if there is none to show."""
        if self.default_text or self.default in (None, (), "", False):
            return self.default_text
        if self.default is True:
            return "on"
        items = self.default if isinstance(self.default, tuple) else (self.default,)
        return ", ".join(_format_item(item) for item in items)

    @property
    def shown_metavar(self) -> str:
        """The name of the value in help texts; "" for a switch."""
        if self.type is bool:
            return ""
        if self.metavar:
            return self.metavar
        return "NAME" if self.choices else {int: "N", float: "X", str: "TEXT"}[self.type]


def _format_item(item: object) -> str:
    return f"{item:g}".replace("e-0", "e-") if isinstance(item, float) else str(item)


def setting(default: Any, help: str, type: type, section: str, **more: Any) -> Any:
    """Return a dataclass field that declares a setting.

    The arguments are the fields of `Setting`, which is stored in the field's metadata.
    """
    spec = Setting(default=default, help=help, type=type, section=section, **more)
    return field(default=default, metadata={"setting": spec})


@dataclass(frozen=True)
class NoEffect(Generic[S]):
    """Names of settings that have no effect if a condition on the other settings is true."""

    names: tuple[str, ...]
    when: Callable[[S], bool]
    reason: str | Callable[[S], str]  # completes "`name` has no effect …"


def check_effects(settings: S, rows: Sequence[NoEffect[S]]) -> None:
    """Raise `ConfigError` if a setting was changed but has no effect.

    `rows` gives the conditions under which settings have no effect.
    """
    for row in rows:
        for name in row.names:
            if is_set(settings, name) and row.when(settings):
                reason = row.reason if isinstance(row.reason, str) else row.reason(settings)
                raise ConfigError(f"`{name}` has no effect {reason}")


def is_set(settings: object, name: str) -> bool:
    """Return whether the value of a setting differs from its default."""
    value, default = getattr(settings, name), getattr(type(settings), name)
    return bool(value != default)


def check_known(name: str, known: Iterable[str], noun: str, *, hint: str = "") -> None:
    """Raise `ConfigError` if `name` is not in `known`.

    The message suggests the most similar known name. If no name is similar, it ends with `hint`.
    """
    known = list(known)
    if name in known:
        return
    hint = suggest_near_name(name, known) or hint
    raise ConfigError(f"unknown {noun} `{cut(name)}`" + (f"; {hint}" if hint else ""))


def suggest_near_name(name: str, known: Iterable[str]) -> str:
    """Return the question whether the most similar known name was meant; "" if none is similar."""
    near = get_close_matches(name.replace("-", "_"), list(known), n=1)
    return f"did you mean `{near[0]}`?" if near else ""


def parse_value(name: str, value: Any, spec: Setting) -> Any:
    """Return the value converted to the type of its setting.

    Raises:
        ConfigError: the value has the wrong type, is out of bounds or is not one of the choices.
    """
    if value is None:
        if spec.is_optional:
            return None
        raise ConfigError(f"`{name}` must be {spec.type.__name__}, got no value")
    if spec.is_list:
        items = list(value) if isinstance(value, list | tuple) else [value]
        return tuple(_parse_item(name, item, spec) for item in items)
    return _parse_item(name, value, spec)


def _parse_item(name: str, value: Any, spec: Setting) -> Any:
    value = _convert(name, value, spec.type)
    if spec.is_path:
        value = os.path.expanduser(value)
    if spec.choices and value not in spec.choices:
        allowed = ", ".join(str(choice) for choice in spec.choices)
        raise ConfigError(f"`{name}` must be one of {allowed}, got {_show(value)}")
    if spec.type in (int, float):
        _check_bounds(name, value, spec)
    return value


def _convert(name: str, value: Any, wanted: type) -> Any:
    if isinstance(value, Path):
        value = str(value)
    if wanted is float and isinstance(value, str):
        # YAML 1.1 parses `5e-6` as text, because it has no decimal point.
        try:
            return float(value)
        except ValueError:
            raise ConfigError(f"`{name}` must be a number, got {_show(value)}") from None
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"`{name}` must be a number, got one that is too large") from None
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        hint = "; quote it if it is text" if wanted is str and isinstance(value, bool) else ""
        raise ConfigError(f"`{name}` must be {wanted.__name__}, got {_show(value)}{hint}")
    if isinstance(value, str):
        _check_text(name, value)
    return value


def _check_text(name: str, value: str) -> None:
    """Raise `ConfigError` if a text has a character that no file name and no prompt has."""
    if "\0" in value:
        raise ConfigError(f"`{name}` must not contain a NUL character, got {_show(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        if not any("\udc80" <= character <= "\udcff" for character in value):  # a name in bytes
            raise ConfigError(
                f"`{name}` contains an unpaired surrogate (invalid Unicode), got {_show(value)}"
            ) from None


def _show(value: object) -> str:
    shown = reprlib.repr(value) if isinstance(value, dict | list) else repr(value)
    return cut(shown)


def cut(text: str) -> str:
    """Return a text as it is shown in an error message: at most `MAX_SHOWN` characters."""
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"


def _check_bounds(name: str, value: float, spec: Setting) -> None:
    above = value > spec.minimum if spec.exclusive_minimum else value >= spec.minimum
    maximum = spec.maximum
    if not math.isfinite(maximum) and math.isfinite(value):
        maximum = MAX_INT if spec.type is int else MAX_FLOAT
        maximum = math.inf if value <= maximum else maximum  # is named only where it is exceeded
    below = value < maximum if spec.exclusive_maximum else value <= maximum
    if not (above and below and math.isfinite(value)):
        low = f"{'above' if spec.exclusive_minimum else 'at least'} {spec.minimum:g}"
        high = f"{'below' if spec.exclusive_maximum else 'at most'} {maximum:g}"
        bounds = [low] * math.isfinite(spec.minimum) + [high] * math.isfinite(maximum)
        raise ConfigError(
            f"`{name}` must be {' and '.join(bounds) or 'finite'}, got {_show(value)}"
        )
