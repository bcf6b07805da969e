"""Several completions of one prompt with scores or ranks: which pairs they make."""

import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any, NamedTuple

from mlx_dpo.errors import TIED, BadPairError, DataError
from mlx_dpo.schemas.messages import pair, text_of, turns_of
from mlx_dpo.schemas.schema import PairOrError, Ranking, Record, Row, RowRules, Schema
from mlx_dpo.types import PreferenceExample, Text

LISTS = ("completions", "responses")  # the field that holds the completions
PROMPTS = ("prompt", "instruction", "question", "messages")  # the first that a row has is taken
TEXTS = ("response", "completion", "text", "content", "value")  # in a completion that is an object
SCORES = ("overall_score", "score", "rating", "reward")  # more is better
RANKS = ("rank",)  # less is better
BESIDE = tuple(f"{name}{s}" for name in (*SCORES, *RANKS) for s in ("s", ""))  # lists in the row


class Rated(NamedTuple):
    """A completion and what was thought of it."""

    text: Text
    score: float  # more is better


def pairs_among(rated: list[Rated], how: Ranking) -> Iterable[tuple[Rated, Rated]]:
    """The better and the worse of each pair, by score; equal ones may be in it."""
    order = sorted(rated, key=lambda one: one.score, reverse=True)  # keeps the order of equals
    if how == "all":
        return combinations(order, 2)
    return pairwise(order) if how == "adjacent" else [(order[0], order[-1])]


def _parse(row: Row, rules: RowRules) -> list[PairOrError]:
    prompt, rated = _prompt(row), _rated(row)
    found: list[PairOrError] = []
    for better, worse in pairs_among(rated, rules.ranked or "best_worst"):
        if better.score == worse.score:
            found.append(BadPairError(row.location, TIED, f"{better.score:g}"))
            continue
        for outcome in pair(row, prompt, better.text, worse.text):
            lead = better.score - worse.score
            found.append(
                replace(outcome, score_gap=lead)
                if isinstance(outcome, PreferenceExample)
                else outcome
            )
    return found


def _prompt(row: Row) -> Text:
    name = next((name for name in PROMPTS if row.record.get(name) is not None), "prompt")
    value = row.record.get(name)
    if isinstance(value, list):
        return turns_of(value, name, row.location)
    return text_of(value, name, row.location)


def _rated(row: Row) -> list[Rated]:
    name = next((name for name in LISTS if name in row.record), LISTS[0])
    items = row.record.get(name)
    if not isinstance(items, list) or len(items) < 2:
        raise DataError(f"{row.location}: `{name}` must be a list of at least two completions")
    scores = _scores(row, items)
    if len(scores) != len(items):
        raise DataError(
            f"{row.location}: {len(scores)} ratings of {len(items)} completions; give one of each"
        )
    texts = [_completion(item, f"{name}[{i}]", row.location) for i, item in enumerate(items)]
    return [Rated(text, score) for text, score in zip(texts, scores, strict=True)]


def _completion(item: Any, name: str, location: str) -> Text:
    if isinstance(item, dict) and "role" not in item:
        key = next((key for key in TEXTS if isinstance(item.get(key), str | list)), None)
        if key is None:
            raise DataError(f"{location}: `{name}` has no text (looked for {', '.join(TEXTS)})")
        item = item[key]
    if isinstance(item, str):
        return text_of(item, name, location)
    turns = turns_of([item] if isinstance(item, dict) else item, name, location)
    if any(turn["role"] != "assistant" for turn in turns):
        raise DataError(f"{location}: `{name}` may hold only the assistant's turns")
    return turns


def _scores(row: Row, items: list[Any]) -> list[float]:
    """More is better, whichever way the row counts."""
    for name in (*SCORES, *RANKS):
        if isinstance(items[0], dict) and items[0].get(name) is not None:
            values = [item.get(name) if isinstance(item, dict) else None for item in items]
            return [_number(value, name, row.location, name in RANKS) for value in values]
    for name in BESIDE:
        beside = row.record.get(name)
        if isinstance(beside, list):
            is_rank = name.removesuffix("s") in RANKS
            return [_number(value, name, row.location, is_rank) for value in beside]
    known = ", ".join((*SCORES, *RANKS))
    raise DataError(f"{row.location}: completions without ratings (looked for {known})")


def _number(value: Any, name: str, location: str, is_rank: bool) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):  # UltraFeedback writes "N/A"
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{location}: `{name}` must be a number, found {value!r}"[:300])
    return -number if is_rank else number


def _fits(record: Record) -> bool:
    lists = any(isinstance(record.get(name), list) for name in LISTS)
    return lists and "chosen" not in record and "label" not in record


RANKED = Schema("ranked", _fits, _parse, frozenset({*LISTS, *PROMPTS, *BESIDE}))
