"""Schema of two completions of one prompt with a verdict on which of them is better.

Known data: AlpacaEval and AlpacaFarm (`output_1`, `output_2`, `preference`), LMSYS arena
(`conversation_a`, `winner`), PKU-SafeRLHF (`response_0`, `better_response_id`), HelpSteer 2 and 3
(`response1`, `overall_preference`), WebGPT (`answer_0`, `score_0`).
"""

import math
import re
from dataclasses import replace
from itertools import product
from typing import Any

from mlx_dpo.errors import DIFFERENT_PROMPTS, TIED, BadPairError, DataError
from mlx_dpo.schemas.messages import make_pair, parse_json_field, parse_messages, parse_text
from mlx_dpo.schemas.pairs.trl import shared_message_count
from mlx_dpo.schemas.schema import PairOrError, Record, Row, RowRules, Schema, format_names
from mlx_dpo.types import PreferenceExample, Text

STEMS = ("output", "response", "answer", "completion", "conversation")
SUFFIXES = (("a", "b"), ("A", "B"), ("0", "1"), ("1", "2"))
ANSWERS = tuple(
    (f"{stem}{separator}{first}", f"{stem}{separator}{second}")
    for (first, second), stem, separator in product(SUFFIXES, STEMS, ("_", ""))
)
PROMPT_FIELDS = ("prompt", "instruction", "question", "context", "messages")
SIGNED = ("overall_preference", "preference_strength")  # below 0 if the first is better
NAMED = ("preference", "winner", "better_response_id", "preferred", "better", "verdict")
AMBIGUOUS = ("choice", "label")  # numbers only count if the answers have the same numbers, 0 and 1
VERDICTS = (*SIGNED, *NAMED, *AMBIGUOUS)
OUTCOMES = ("winner_model_a", "winner_model_b", "winner_tie")
SCORES = ("score", "rating", "reward")  # of an answer, with the same suffix; higher is better
TIES = {"tie", "tie (bothbad)", "tie (both bad)", "bothbad", "both_bad", "both bad", "both", "draw",
        "equal", "same", "neither", "none"}  # fmt: skip
VERDICT_WORD = re.compile(r"(?:\w*[a-z][ _-])?(?P<suffix>[ab012])")


def find_answers(record: Record) -> tuple[str, str] | None:
    """Return the names of the two fields with the answers, or None if the row has no such two."""
    return next((pair for pair in ANSWERS if pair[0] in record and pair[1] in record), None)


def _parse(row: Row, rules: RowRules) -> list[PairOrError]:
    names = find_answers(row.record)
    if names is None:
        raise DataError(
            f"{row.location}: missing two answers such as `response_a` and `response_b` (found "
            f"{format_names(row.record)})"
        )
    lead, is_graded = _parse_preference(row, names)
    if lead == 0:
        return [BadPairError(row.location, TIED)]
    parsed = _parse_answers(row, names)
    if parsed is None:
        return [BadPairError(row.location, DIFFERENT_PROMPTS)]
    prompt, first, second = parsed
    chosen, rejected = (second, first) if lead > 0 else (first, second)
    pairs = make_pair(row, prompt, chosen, rejected)
    if not is_graded:
        return pairs
    return [
        replace(pair, score_gap=abs(lead)) if isinstance(pair, PreferenceExample) else pair
        for pair in pairs
    ]


def _parse_answers(row: Row, names: tuple[str, str]) -> tuple[Text, Text, Text] | None:
    """Return prompt and answers; None if the answers are conversations with different prompts."""
    first, second = (_parse_text_or_messages(row, name) for name in names)
    if isinstance(first, str) or isinstance(second, str) or first[0]["role"] == "assistant":
        return _parse_prompt(row), first, second
    end = shared_message_count(first, second)
    if any(turn["role"] != "assistant" for turn in (*first[end:], *second[end:])):
        return None
    return first[:end], first[end:], second[end:]


def _parse_prompt(row: Row) -> Text:
    name = next((name for name in PROMPT_FIELDS if row.record.get(name) is not None), "prompt")
    prompt = _parse_text_or_messages(row, name)
    more = row.record.get("input") if name == "instruction" else None
    if isinstance(prompt, str) and more:
        return f"{prompt}\n{parse_text(more, 'input', row.location)}"
    return prompt


def _parse_text_or_messages(row: Row, name: str) -> Text:
    value = row.record.get(name)
    if isinstance(value, str) and re.match(r'\s*\["', value):  # LMSYS: the turns of one side
        value = parse_json_field(value, name, row.location)
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        if len(value) > 1:  # the answers differ before the last turn
            raise BadPairError(row.location, DIFFERENT_PROMPTS, f"{len(value)} turns")
        value = value[0]
    if isinstance(value, list):
        return parse_messages(value, name, row.location)
    return parse_text(value, name, row.location)


def _parse_preference(row: Row, names: tuple[str, str]) -> tuple[float, bool]:
    """Return by how much the second answer is better, and whether the size means something.

    Raises:
        DataError: the row does not say which answer is better.
    """
    record = row.record
    if all(name in record for name in OUTCOMES[:2]):
        first, second = (_number(record[name], name, row.location) for name in OUTCOMES[:2])
        return second - first, False
    for name in VERDICTS:
        if record.get(name) is not None:
            return _parse_verdict(record[name], name, names, row.location)
    for score in SCORES:
        columns = [f"{score}_{name[-1]}" for name in names]
        if all(record.get(column) is not None for column in columns):
            first, second = (_number(record[column], column, row.location) for column in columns)
            return second - first, True
    raise DataError(
        f"{row.location}: no column says whether `{names[0]}` or `{names[1]}` is better (looked "
        "for "
        f"{', '.join(VERDICTS)}, score_{names[0][-1]}); add such a column, or write `chosen` and "
        "`rejected`"
    )


def _parse_verdict(
    value: Any, name: str, names: tuple[str, str], location: str
) -> tuple[float, bool]:
    if name in SIGNED:
        return _number(value, name, location), True
    if isinstance(value, str) and (lead := read_verdict(value, names)) is not None:
        return lead, False
    suffixes = names[0][-1] + names[1][-1]
    number = None if isinstance(value, bool) else _to_number(value)
    if number is not None:
        if suffixes == "01" and number in (0, 1):
            return 2 * number - 1, False
        if suffixes == "12" and name in NAMED and 1 <= number <= 2:
            return 2 * number - 3, number not in (1, 2)
        if suffixes == "12" and name == "preference" and number == 0:  # AlpacaEval's tie
            return 0, False
    raise DataError(
        f"{location}: `{name}` does not say whether `{names[0]}` or `{names[1]}` is better (found "
        f"{str(value)[:40]!r}); write the name of the better one there, or `chosen` and `rejected`"
    )


def read_verdict(text: str, names: tuple[str, str]) -> float | None:
    """Return -1 if a verdict names the first answer, 1 for the second, 0 for a tie, or None.

    Args:
        text: the verdict, such as `model_a`, `Response 1`, `second` or `tie`.
        names: names of the two fields with the answers.
    """
    word = text.strip().lower().strip("[]")
    if word in TIES:
        return 0
    ends = [name[-1].lower() for name in names]
    whole = [name.lower() for name in names]
    if word in whole:
        return 2 * whole.index(word) - 1
    match = VERDICT_WORD.fullmatch(word)
    suffix = match["suffix"] if match else {"first": ends[0], "second": ends[1]}.get(word)
    has_name = match is not None and match["suffix"] != word  # `response_1`, not a bare `1`
    if suffix not in ends or (suffix in "012" and match is not None and not has_name):
        return None
    return 2 * ends.index(suffix) - 1


def _to_number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _number(value: Any, name: str, location: str) -> float:
    number = _to_number(value)
    if number is None:
        raise DataError(f"{location}: `{name}` must be a number (found {str(value)[:40]!r})")
    return number


FIELDS = frozenset(
    {*PROMPT_FIELDS, "input", *VERDICTS, *OUTCOMES}
    | {name for pair in ANSWERS for name in pair}
    | {f"{score}_{suffix}" for score in SCORES for pair in SUFFIXES for suffix in pair}
)
COMPARED = Schema(
    "compared",
    lambda record: find_answers(record) is not None and not {"chosen", "rejected"} & record.keys(),
    _parse,
    FIELDS,
)
