"""The two stated rules: is an answer courteous, is its content right. Pure functions of text."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


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
