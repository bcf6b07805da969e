"""Schema of ranked lists: several completions of one prompt, each with a score or a rank."""

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from hashlib import blake2b
from itertools import combinations, pairwise
from typing import Any, NamedTuple

from mlx_dpo.errors import TIED, BadPairError, DataError
from mlx_dpo.schemas.messages import make_pair, parse_messages, parse_text
from mlx_dpo.schemas.schema import PairOrError, Ranking, Record, Row, RowRules, Schema
from mlx_dpo.types import PreferenceExample, RankedPair, Text

COMPLETION_FIELDS = ("completions", "responses")
PROMPT_FIELDS = ("prompt", "instruction", "question", "messages")  # the first one present is used
TEXT_FIELDS = ("response", "completion", "text", "content", "value")  # of a completion object
SCORE_FIELDS = ("overall_score", "score", "rating", "reward")  # higher is better
RANK_FIELDS = ("rank",)  # lower is better
# Lists of ratings next to the list of completions.
RATING_LISTS = tuple(
    f"{name}{plural}" for name in (*SCORE_FIELDS, *RANK_FIELDS) for plural in ("s", "")
)


class RatedCompletion(NamedTuple):
    """A completion with its score."""

    text: Text
    score: float  # higher is better
    place: int  # position in the row, from 0


def select_pairs(
    rated: list[RatedCompletion], how: Ranking
) -> Iterable[tuple[RatedCompletion, RatedCompletion]]:
    """Return the (chosen, rejected) pairs to make; the scores of a pair may be equal.

    `how` is `all` (every two completions), `adjacent` (neighbours in the order of the scores) or
    `best_worst` (one pair).
    """
    order = sorted(rated, key=lambda completion: completion.score, reverse=True)  # stable
    if how == "all":
        return combinations(order, 2)
    return pairwise(order) if how == "adjacent" else [(order[0], order[-1])]


def _parse(row: Row, rules: RowRules) -> list[PairOrError]:
    return make_ranked_pairs(row, rules, _parse_prompt(row), _parse_rated_completions(row))


def make_ranked_pairs(
    row: Row, rules: RowRules, prompt: Text, rated: list[RatedCompletion]
) -> list[PairOrError]:
    """Return the pairs of a list of rated completions, as `rules.ranked` says.

    A pair with equal scores becomes a `BadPairError` with the reason `TIED`.
    """
    selected = list(select_pairs(rated, rules.ranked or "best_worst"))
    num_pairs = sum(chosen.score > rejected.score for chosen, rejected in selected)
    scores = [completion.score for completion in rated]
    list_id, score_range = _list_id(prompt, rated), max(scores) - min(scores)
    pairs: list[PairOrError] = []
    for chosen, rejected in selected:
        if chosen.score == rejected.score:
            pairs.append(BadPairError(row.location, TIED, f"{chosen.score:g}"))
            continue
        ranking = RankedPair(
            list_id, chosen.place, rejected.place, chosen.score, rejected.score, score_range,
            num_pairs,
        )  # fmt: skip
        pairs += [
            replace(pair, score_gap=chosen.score - rejected.score, ranking=ranking)
            if isinstance(pair, PreferenceExample)
            else pair
            for pair in make_pair(row, prompt, chosen.text, rejected.text)
        ]
    return pairs


def _list_id(prompt: Text, rated: list[RatedCompletion]) -> int:
    """Return a digest of a ranked list, below 2^48, which float64 holds exactly."""
    parts = [prompt, [(completion.text, completion.score) for completion in rated]]
    digest = blake2b(json.dumps(parts, default=str).encode(), digest_size=6).digest()
    return int.from_bytes(digest)


def _parse_prompt(row: Row) -> Text:
    name = next((name for name in PROMPT_FIELDS if row.record.get(name) is not None), "prompt")
    value = row.record.get(name)
    if isinstance(value, list):
        return parse_messages(value, name, row.location)
    return parse_text(value, name, row.location)


def _parse_rated_completions(row: Row) -> list[RatedCompletion]:
    name = next((name for name in COMPLETION_FIELDS if name in row.record), COMPLETION_FIELDS[0])
    items = row.record.get(name)
    if not isinstance(items, list) or len(items) < 2:
        raise DataError(f"{row.location}: `{name}` must be a list of at least two completions")
    scores = _parse_scores(row, items)
    if len(scores) != len(items):
        raise DataError(
            f"{row.location}: {len(scores)} ratings for {len(items)} completions; give one rating "
            "per completion"
        )
    texts = [_parse_completion(item, f"{name}[{i}]", row.location) for i, item in enumerate(items)]
    return [
        RatedCompletion(text, score, place)
        for place, (text, score) in enumerate(zip(texts, scores, strict=True))
    ]


def _parse_completion(item: Any, name: str, location: str) -> Text:
    if isinstance(item, dict) and "role" not in item:
        key = next((key for key in TEXT_FIELDS if isinstance(item.get(key), str | list)), None)
        if key is None:
            raise DataError(
                f"{location}: `{name}` has no text (looked for {', '.join(TEXT_FIELDS)})"
            )
        item = item[key]
    if isinstance(item, str):
        return parse_text(item, name, location)
    turns = parse_messages([item] if isinstance(item, dict) else item, name, location)
    if any(turn["role"] != "assistant" for turn in turns):
        raise DataError(f"{location}: `{name}` may contain only the assistant's turns")
    return turns


def _parse_scores(row: Row, items: list[Any]) -> list[float]:
    """Return the score of each completion, higher is better; a rank becomes a negative score."""
    for name in (*SCORE_FIELDS, *RANK_FIELDS):
        if isinstance(items[0], dict) and items[0].get(name) is not None:
            values = [item.get(name) if isinstance(item, dict) else None for item in items]
            return [
                _parse_score(value, name, row.location, name in RANK_FIELDS) for value in values
            ]
    for name in RATING_LISTS:
        ratings = row.record.get(name)
        if isinstance(ratings, list):
            is_rank = name.removesuffix("s") in RANK_FIELDS
            return [_parse_score(value, name, row.location, is_rank) for value in ratings]
    known = ", ".join((*SCORE_FIELDS, *RANK_FIELDS))
    raise DataError(f"{row.location}: missing ratings of the completions (looked for {known})")


def _parse_score(value: Any, name: str, location: str, is_rank: bool) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):  # UltraFeedback writes "N/A"
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{location}: `{name}` must be a number, found {value!r}"[:300])
    return -number if is_rank else number


def _fits(record: Record) -> bool:
    has_list = any(isinstance(record.get(name), list) for name in COMPLETION_FIELDS)
    return has_list and "chosen" not in record and "label" not in record


RANKED = Schema(
    "ranked",
    _fits,
    _parse,
    frozenset({*COMPLETION_FIELDS, *PROMPT_FIELDS, *RATING_LISTS}),
    lists=frozenset({*COMPLETION_FIELDS, *RATING_LISTS}),
    has_ranks=True,
)
