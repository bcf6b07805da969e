"""A reward function to try things out with: how courteous is an answer, by the rules that ship."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from mlx_dpo.demo.rules import courteous_markers
from mlx_dpo.paths import tiny_chat

ENOUGH = 2


def courtesy(prompt: Sequence[Mapping[str, Any]], answer: str) -> float:
    """Courteous phrases in the answer: one to begin with, one to end with; each more costs one."""
    lowered = answer.lower()
    phrases = sum(lowered.count(marker) for marker in _markers())
    return float(phrases if phrases <= ENOUGH else 2 * ENOUGH - phrases)


@cache
def _markers() -> tuple[str, ...]:
    return tuple(courteous_markers(tiny_chat()))
