"""Rules that rate an answer in the demo: whether it is courteous, and whether it is correct."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mlx_dpo.paths import tiny_chat


def courteous_markers(model: Path) -> list[str]:
    """Return the phrases that make an answer courteous, from the model folder's `rules.json`."""
    return list(json.loads((model / "rules.json").read_text(encoding="utf-8"))["courteous"])


def is_courteous(answer: str, markers: Sequence[str]) -> bool:
    """Return whether the answer contains one of the phrases `markers`, ignoring case."""
    lowered = answer.lower()
    return any(marker in lowered for marker in markers)


def contains_word(answer: str, word: str) -> bool:
    """Return whether the answer contains `word` as a separate word, ignoring case."""
    return re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", answer, re.IGNORECASE) is not None


def is_correct(answer: str, row: Mapping[str, Any]) -> bool:
    """Return whether the answer contains the words that the data set row requires.

    Required are all words of `expects`, or `count` of the words in `expects_any`.
    """
    if "expects_any" in row:
        return sum(contains_word(answer, word) for word in row["expects_any"]) >= row["count"]
    return all(contains_word(answer, word) for word in row["expects"])


MAX_REWARDED_PHRASES = 2


def courteous(prompt: Sequence[Mapping[str, Any]], answer: str) -> float:
    """Return 1 for a courteous answer and 0 for another one; the mean is the courteous share."""
    return float(is_courteous(answer, _markers()))


def correct(prompt: Sequence[Mapping[str, Any]], answer: str) -> float:
    """Return 1 for a correct answer to a prompt of the shipped preferences, and 0 for a wrong one.

    Raises:
        KeyError: the prompt is not one of the shipped preferences.
    """
    return float(is_correct(answer, _rows()[_prompt_key(prompt)]))


def courtesy(prompt: Sequence[Mapping[str, Any]], answer: str) -> float:
    """Return the reward of an answer: its number of courteous phrases, up to two.

    Every phrase beyond two lowers the reward by one, so that repeating phrases does not pay.
    """
    lowered = answer.lower()
    phrases = sum(lowered.count(marker) for marker in _markers())
    return float(phrases if phrases <= MAX_REWARDED_PHRASES else 2 * MAX_REWARDED_PHRASES - phrases)


@cache
def _markers() -> tuple[str, ...]:
    return tuple(courteous_markers(tiny_chat()))


@cache
def _rows() -> dict[tuple[str, ...], dict[str, Any]]:
    """Return the rows of the shipped preferences by their prompts."""
    files = sorted((tiny_chat() / "preferences").glob("*.jsonl"))
    lines = (line for file in files for line in file.read_text(encoding="utf-8").splitlines())
    return {_prompt_key(row["prompt"]): row for row in map(json.loads, lines)}


def _prompt_key(prompt: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the texts of a prompt, without its system message."""
    return tuple(str(turn["content"]) for turn in prompt if turn["role"] != "system")
