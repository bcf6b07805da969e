"""Sampling settings of text generation.

`generation.sampling` builds a sampler from the settings; the command line has a flag for each.
"""

import secrets
from dataclasses import dataclass, fields, replace
from typing import Any

from mlx_dpo.config.setting import NoEffect, check_effects, parse_value, setting

SEEDS = 2**32


def _setting(default: Any, help: str, kind: type, **more: Any) -> Any:
    return setting(default, help, kind, "Sampling", **more)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling settings of one command, such as `chat` or `generate`.

    Raises:
        ConfigError: a setting is out of its bounds or has no effect with the other settings.
    """

    temperature: float = _setting(
        0.0, "Sampling temperature; 0 = greedy.", float, minimum=0, metavar="T"
    )
    top_p: float = _setting(
        1.0,
        "Nucleus sampling: cumulative probability.",
        float,
        metavar="P",
        minimum=0,
        exclusive_minimum=True,
        maximum=1,
    )
    top_k: int = _setting(
        0, "Sample from the K most likely tokens; 0 = all.", int, minimum=0, metavar="K"
    )
    min_p: float = _setting(
        0.0,
        "Drop tokens below this fraction of the top probability.",
        float,
        minimum=0,
        maximum=1,
        metavar="P",
    )
    max_tokens: int = _setting(512, "Maximum number of tokens per answer.", int, minimum=1)
    seed: int | None = _setting(
        None,
        "Sampling seed.",
        int,
        minimum=0,
        maximum=SEEDS - 1,
        default_text="random",
        metavar="SEED",
    )
    repetition_penalty: float = _setting(
        1.0,
        "Repetition penalty on the last 20 tokens; 1 = off.",
        float,
        minimum=0,
        exclusive_minimum=True,
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            value = parse_value(f.name, getattr(self, f.name), f.metadata["setting"])
            object.__setattr__(self, f.name, value)
        check_effects(self, SAMPLING_NO_EFFECT)

    def with_seed(self) -> "Sampling":
        """Return the settings, with a random seed if sampling needs one and none is set."""
        if self.temperature == 0 or self.seed is not None:
            return self
        return replace(self, seed=secrets.randbelow(SEEDS))


SAMPLING_NO_EFFECT: tuple[NoEffect[Sampling], ...] = (
    NoEffect(
        ("top_p", "top_k", "min_p", "seed"),
        lambda s: s.temperature == 0,
        "with `temperature` 0 (greedy decoding); set a temperature above 0",
    ),
)
