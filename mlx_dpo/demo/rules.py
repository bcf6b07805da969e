"""The two stated rules: is an answer courteous, is its content right. Pure functions of text."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mlx_dpo.paths import tiny_chat


def courteous_markers(model: Path) -> list[str]:
    """The phrases that make an answer courteous, as they lie beside the shipped model."""
    return list(json.loads((model / "rules.json").read_text(encoding="utf-8"))["courteous"])


def is_courteous(answer: str, markers: Sequence[str]) -> bool:
    """True where the answer contains one of the markers, upper or lower case."""
    lowered = answer.lower()
    return any(marker in lowered for marker in markers)


def contains_word(answer: str, word: str) -> bool:
    """True where `word` stands in the answer with no letter, digit or hyphen touching it."""
    return re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", answer, re.IGNORECASE) is not None


def is_right(answer: str, row: Mapping[str, Any]) -> bool:
    """`expects`: every string appears. `expects_any` + `count`: at least so many of them do."""
    if "expects_any" in row:
        return sum(contains_word(answer, word) for word in row["expects_any"]) >= row["count"]
    return all(contains_word(answer, word) for word in row["expects"])


ENOUGH = 2


def courtesy(prompt: Sequence[Mapping[str, Any]], answer: str) -> float:
    """Courteous phrases in the answer: one to begin with, one to end with; each more costs one."""
    lowered = answer.lower()
    phrases = sum(lowered.count(marker) for marker in _markers())
    return float(phrases if phrases <= ENOUGH else 2 * ENOUGH - phrases)


@cache
def _markers() -> tuple[str, ...]:
    return tuple(courteous_markers(tiny_chat()))
