"""How the next token is chosen, as settings: checked once, knows no arrays.

`policy.generation` turns them into arrays' work; the command line makes its flags from them.
"""

import secrets
from dataclasses import dataclass, fields, replace
from typing import Any

from mlx_dpo.config.option import coerce, option
from mlx_dpo.errors import ConfigError

SEEDS = 2**32
NEEDS_TEMPERATURE = ("top_p", "top_k", "min_p", "seed")


def _setting(default: Any, help: str, kind: type, **more: Any) -> Any:
    return option(default, help, kind, "Sampling", **more)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The choice of tokens in one session.

    Raises:
        ConfigError: a setting is out of its bounds or has no effect beside the others.
    """

    temperature: float = _setting(0.0, "Spread of the choice; 0 takes the likeliest.", float, low=0)
    top_p: float = _setting(
        1.0, "Choose among the likeliest tokens of this total.", float, low=0, open_low=True, high=1
    )
    top_k: int = _setting(0, "Choose among this many tokens; 0 is all.", int, low=0)
    min_p: float = _setting(
        0.0, "Leave out tokens below this share of the likeliest.", float, low=0, high=1
    )
    max_tokens: int = _setting(512, "Tokens after which an answer is cut.", int, low=1)
    seed: int | None = _setting(
        None, "Seed of the choice. [default: drawn anew]", int, low=0, high=SEEDS - 1
    )
    repetition_penalty: float = _setting(
        1.0, "Above 1: avoid the last 20 tokens.", float, low=0, open_low=True
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            value = coerce(f.name, getattr(self, f.name), f.metadata["option"])
            object.__setattr__(self, f.name, value)
        if self.temperature == 0:
            self._refuse_settings_without_effect()

    def _refuse_settings_without_effect(self) -> None:
        for f in fields(self):
            if f.name in NEEDS_TEMPERATURE and getattr(self, f.name) != f.default:
                raise ConfigError(
                    f"`{f.name}` has no effect with `temperature` 0 (the likeliest token is "
                    "always taken); set a temperature above 0"
                )

    def seeded(self) -> "Sampling":
        """The same with a seed drawn where one is missing: what was said can be said again."""
        if self.temperature == 0 or self.seed is not None:
            return self
        return replace(self, seed=secrets.randbelow(SEEDS))
