"""What a loop asks: prompts to collect with, round by round, and prompts to measure on."""

import random
from collections.abc import Sequence
from hashlib import sha256
from typing import NamedTuple

from mlx_dpo.errors import ConfigError
from mlx_dpo.preferences.prompts import Prompt, held_out_prompts, read_prompts, with_system

HELD_OUT_SHARE = 0.1


class LoopPrompts(NamedTuple):
    """The prompts of a loop."""

    train: list[Prompt]
    valid: list[Prompt]
    notes: list[str]

    def of_round(self, number: int, count: int | None) -> list[Prompt]:
        """Those of round 1, 2, …: all, or the next `count`, from the beginning again at the end."""
        if count is None or count >= len(self.train):
            return self.train
        start = (number - 1) * count
        return [self.train[at % len(self.train)] for at in range(start, start + count)]


def read_loop_prompts(
    prompts: str, valid_prompts: str | None, system: str | None = None
) -> LoopPrompts:
    """Prompts to collect with and to measure on, each with a system turn; none is in both.

    Raises:
        DataError, ConfigError: there are none, or too few to hold some out.
    """
    train = read_prompts(prompts)
    if valid_prompts is not None:
        valid = held_out_prompts(valid_prompts) or read_prompts(valid_prompts)
    else:
        valid = held_out_prompts(prompts) or _some(train)
    train, valid = with_system(train, system), with_system(valid, system)
    keys = {prompt.key for prompt in valid}
    kept = [prompt for prompt in train if prompt.key not in keys]
    if not kept:
        raise ConfigError(f"{prompts}: every prompt is held out; give more of them")
    asked_of = valid_prompts or prompts
    notes = [f"{len(kept):,} prompts to collect with, {len(valid):,} held out ({asked_of})"]
    return LoopPrompts(kept, valid, notes)


def _some(prompts: Sequence[Prompt]) -> list[Prompt]:
    count = max(1, round(HELD_OUT_SHARE * len(prompts)))
    places = random.Random(0).sample(range(len(prompts)), count)
    return [prompts[at] for at in sorted(places)]


def digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256 over the prompts in order, in hex."""
    return sha256("".join(prompt.key for prompt in prompts).encode()).hexdigest()
