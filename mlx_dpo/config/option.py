"""What a setting is: its help, type and bounds, and values checked against them."""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mlx_dpo.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Option:
    """What a setting is, beside its default."""

    help: str
    kind: type
    section: str
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False  # the lower bound itself is refused
    open_high: bool = False
    choices: tuple[Any, ...] = ()
    optional: bool = False  # None is a value: "not set"
    many: bool = False  # a list of values
    path: bool = False  # `~` is the home folder, as a shell would read it
    changes_result: bool = True  # a resumed run must have the same value


def option(default: Any, help: str, kind: type, section: str, **more: Any) -> Any:
    """A dataclass field that carries its `Option`."""
    spec = Option(help=help, kind=kind, section=section, optional=default is None, **more)
    return field(default=default, metadata={"option": spec})


def refuse_unknown(name: str, known: Iterable[str], what: str, *, see: str = "") -> None:
    """Raise for a name that is not known, with the nearest one that is, or where to `see` them."""
    known = list(known)
    if name in known:
        return
    near = get_close_matches(name.replace("-", "_"), known, n=1)
    hint = f"did you mean `{near[0]}`?" if near else see
    raise ConfigError(f"unknown {what} `{name}`" + (f"; {hint}" if hint else ""))


def coerce(name: str, value: Any, spec: Option) -> Any:
    """The value in its own type, or an error that names the setting, the bound and the value."""
    if value is None:
        if spec.optional:
            return None
        raise ConfigError(f"`{name}` must be {spec.kind.__name__}, got nothing")
    if spec.many:
        items = list(value) if isinstance(value, list | tuple) else [value]
        return tuple(_one(name, item, spec) for item in items)
    return _one(name, value, spec)


def _one(name: str, value: Any, spec: Option) -> Any:
    value = _typed(name, value, spec.kind)
    if spec.path:
        value = os.path.expanduser(value)
    if spec.choices and value not in spec.choices:
        allowed = ", ".join(str(choice) for choice in spec.choices)
        raise ConfigError(f"`{name}` must be one of {allowed}, got {value!r}")
    if spec.kind in (int, float):
        _check_bounds(name, value, spec)
    return value


def _typed(name: str, value: Any, kind: type) -> Any:
    if isinstance(value, Path):
        value = str(value)
    if kind is float and isinstance(value, str):
        # YAML 1.1 reads `5e-6` as text, because it has no decimal point.
        try:
            return float(value)
        except ValueError:
            raise ConfigError(f"`{name}` must be a number, got {value!r}") from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"`{name}` must be {kind.__name__}, got {value!r}")
    return value


def _check_bounds(name: str, value: float, spec: Option) -> None:
    above = value > spec.low if spec.open_low else value >= spec.low
    below = value < spec.high if spec.open_high else value <= spec.high
    if not (above and below and math.isfinite(value)):
        low = f"{'above' if spec.open_low else 'at least'} {spec.low:g}"
        high = f"{'below' if spec.open_high else 'at most'} {spec.high:g}"
        bounds = [low] * math.isfinite(spec.low) + [high] * math.isfinite(spec.high)
        raise ConfigError(f"`{name}` must be {' and '.join(bounds) or 'finite'}, got {value!r}")
