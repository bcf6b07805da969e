"""Schema of Argilla's records (2.x): ranking, label and rating questions about several answers.

Formats: `Dataset.records.to_json` and `to_list` (nested: `fields`, `responses` by question), and
`to_datasets`, `to_list(flatten=True)` and `Dataset.to_hub` (flat: columns `QUESTION.responses` and
`QUESTION.responses.status`), from `argilla/src/argilla/records/_io/_generic.py` and `_resource.py`
of argilla-io/argilla, 2.x, and its guide «Importing and exporting datasets and records»; checked
with the package, 2.8.0. Names of fields and questions are those of the guides and of distilabel's
`PreferenceToArgilla`.
"""

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any, NamedTuple

from mlx_dpo.errors import TIED, UNJUDGED, BadPairError, DataError
from mlx_dpo.schemas.annotation_tools.votes import (
    CHOSEN_REJECTED,
    find_answer_fields,
    find_majority,
    parse_content,
    read_vote,
    require_prompt,
    simplify,
)
from mlx_dpo.schemas.messages import make_pair
from mlx_dpo.schemas.pairs.ranked import RatedCompletion, make_ranked_pairs
from mlx_dpo.schemas.schema import PairOrError, Record, Row, RowRules, Schema, format_names

RESPONSES, STATUS, USERS = ".responses", ".responses.status", ".responses.users"
SUBMITTED = "submitted"
PREFERENCE = "preference"  # the question, if `--column preference=…` names one
FIELDS = frozenset({
    "id", "fields", "metadata", "suggestions", "responses", "vectors", "_server_id", "status",
    "inserted_at", "updated_at", "score", "prompt", *CHOSEN_REJECTED, PREFERENCE,
})  # fmt: skip
Values = list[Any]  # the submitted values of one question
Ranks = dict[str, float]  # answer -> score, higher is better


class Answers(NamedTuple):
    """The answers of a record by the names of their fields."""

    names: tuple[str, ...]
    by_label: Mapping[str, str]  # name in letters and digits -> name of the field


def _parse(row: Row, rules: RowRules) -> list[PairOrError]:
    fields, questions = _read_nested(row) if _is_nested(row.record) else _read_flat(row, rules)
    questions = {name: values for name, values in questions.items() if values}
    if not questions:
        return [BadPairError(row.location, UNJUDGED)]
    prompt_name = require_prompt(fields, row.location, "fields.")
    names = tuple(find_answer_fields(fields))
    if len(names) < 2:
        raise DataError(
            f"{row.location}: cannot tell which fields are the answers (found "
            f"{format_names(fields)}; looked for names such as `response1` and `generation-0`)"
        )
    answers = Answers(names, {simplify(name): name for name in names})
    prompt = parse_content(fields[prompt_name], prompt_name, row.location)
    texts = {name: parse_content(fields[name], name, row.location) for name in names}
    if (ranking := _find_ranking(questions, answers, row.location)) is not None:
        rated = [
            RatedCompletion(texts[name], score, names.index(name))
            for name, score in ranking.items()
        ]
        return make_ranked_pairs(row, rules, prompt, rated)
    vote = find_majority(_find_votes(questions, answers, row.location))
    if vote == 0:
        return [BadPairError(row.location, TIED)]
    first, second = (texts[name] for name in names)
    chosen, rejected = (first, second) if vote < 0 else (second, first)
    return make_pair(row, prompt, chosen, rejected)


def _read_nested(row: Row) -> tuple[dict[str, Any], dict[str, Values]]:
    """Return the fields and the submitted responses of a nested record.

    Argilla leaves the status of a response out of this form; then every response counts.
    """
    record = row.record
    responses = {PREFERENCE: record[PREFERENCE]} if PREFERENCE in record else record["responses"]
    questions = {}
    for question, items in responses.items():
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise DataError(f"{row.location}: the responses to `{question}` must be objects")
        questions[question] = [
            item.get("value") for item in items if item.get("status") in (None, SUBMITTED)
        ]
    overrides = {name: record[name] for name in ("prompt", *CHOSEN_REJECTED) if name in record}
    return record["fields"] | overrides, questions


def _read_flat(row: Row, rules: RowRules) -> tuple[dict[str, Any], dict[str, Values]]:
    """Return the fields and the submitted responses of a flat record."""
    record = row.record
    columns = {
        name.removesuffix(RESPONSES): name for name in record if name.endswith(RESPONSES)
    }  # fmt: skip
    statuses = {question: record.get(question + STATUS) for question in columns}
    if PREFERENCE in record and isinstance(record[PREFERENCE], list):
        named = rules.renamed.get(PREFERENCE, "").removesuffix(RESPONSES)
        columns, statuses = {PREFERENCE: PREFERENCE}, {PREFERENCE: record.get(named + STATUS)}
    questions = {}
    for question, column in columns.items():
        values = record[column]
        if not isinstance(values, list | None):
            raise DataError(f"{row.location}: `{column}` must be a list")
        status = statuses[question]
        known = status if isinstance(status, list) else [SUBMITTED] * len(values or ())
        questions[question] = [
            value
            for value, state in zip(values or (), known, strict=False)
            if state in (None, SUBMITTED)
        ]
    fields = {
        name: value
        for name, value in record.items()
        if "." not in name and (name not in FIELDS or name in ("prompt", *CHOSEN_REJECTED))
    }
    return fields, questions


def _find_ranking(questions: Mapping[str, Values], answers: Answers, location: str) -> Ranks | None:
    """Return a score per answer, from a ranking question or else from rating questions.

    The score is the mean over annotators of the place (negative) or of the rating. The result is
    None if there are no such questions.
    """
    rankings = {
        question: ranks
        for question, values in questions.items()
        if (ranks := [_read_places(value, answers) for value in values]) and None not in ranks
    }
    if rankings:
        [places] = _take_single(rankings, location)
        return {name: -fmean(ranks[name] for ranks in places) for name in answers.names}
    ratings = {}
    for question, values in questions.items():
        name = _rated_answer(question, answers)
        numbers = [v for v in values if _is_number(v)]
        if name is None or not numbers:
            continue
        if name in ratings:
            raise DataError(
                f"{location}: several questions rate `{name}`; keep the responses of one of them"
            )
        ratings[name] = fmean(numbers)
    return ratings if len(ratings) > 1 else None


def _read_places(value: Any, answers: Answers) -> dict[str, float] | None:
    """Return the place of each answer in a ranking, from 1; None if the value is no ranking.

    A ranking is a list of all answers, best first, or of objects with `value` and `rank`.
    """
    if not isinstance(value, list) or len(value) != len(answers.names):
        return None
    places: dict[str, float] = {}
    for place, item in enumerate(value, start=1):
        label, rank = (
            (item.get("value"), item.get("rank")) if isinstance(item, dict) else (item, None)
        )
        name = answers.by_label.get(simplify(label)) if isinstance(label, str) else None
        if name is None:
            return None
        places[name] = place if rank is None or not _is_number(rank) else rank
    return places if len(places) == len(answers.names) else None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _rated_answer(question: str, answers: Answers) -> str | None:
    """Return the answer that a rating question is about: `generation-0-rating` has its name."""
    named = [name for label, name in answers.by_label.items() if label in simplify(question)]
    return max(named, key=len) if named else None


def _find_votes(questions: Mapping[str, Values], answers: Answers, location: str) -> list[int]:
    """Return the votes of a label question: -1, 0 or 1 per annotator.

    Raises:
        DataError: no question says which answer is better, or several do.
    """
    votes = {}
    if len(answers.names) == 2:
        names = (answers.names[0], answers.names[1])
        for question, values in questions.items():
            found = [read_vote(v, names) if isinstance(v, str) else None for v in values]
            if None not in found:
                votes[question] = [vote for vote in found if vote is not None]
    if not votes:
        raise DataError(
            f"{location}: no question says which answer is better (found "
            f"{format_names(questions)}; answers {format_names(answers.by_label)}); the responses "
            "must be the names of the answers, their ratings, or labels such as `response1`, `tie`"
        )
    [single] = _take_single(votes, location)
    return list(single)


def _take_single(found: Mapping[str, Any], location: str) -> list[Any]:
    """Return a list of the one value; raise `DataError` if there are several questions."""
    if len(found) > 1:
        raise DataError(
            f"{location}: several questions say which answer is better (found "
            f"{format_names(found)}); choose one: --column preference=responses.NAME, or "
            "--column preference=NAME.responses in a flat export"
        )
    return list(found.values())


def _is_nested(record: Record) -> bool:
    return isinstance(record.get("fields"), dict) and isinstance(record.get("responses"), dict)


def _fits(record: Record) -> bool:
    return _is_nested(record) or any(
        name.endswith(USERS) and name.removesuffix(".users") in record for name in record
    )


ARGILLA = Schema("argilla", _fits, _parse, FIELDS, has_ranks=True, has_own_names=True)
