"""Schema of Label Studio's exports of pairwise comparisons, as JSON and as JSON_MIN.

Formats: Label Studio's guide «Export annotations», sections «JSON» and «JSON_MIN», and the
templates «Pairwise classification» and «Human Preference collection for RLHF»
(`docs/source/guide/export.md` and `label_studio/annotation_templates` of HumanSignal/label-studio,
1.x). What JSON_MIN leaves of a result is from `prettify_result` of its converter, checked with
label-studio-sdk 2.1.2.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from mlx_dpo.errors import TIED, UNJUDGED, BadPairError, DataError
from mlx_dpo.schemas.annotation_tools.votes import (
    find_answer_fields,
    find_majority,
    find_prompt_field,
    parse_content,
    read_vote,
    require_prompt,
)
from mlx_dpo.schemas.messages import make_pair
from mlx_dpo.schemas.schema import PairOrError, Record, Row, RowRules, Schema, format_names

MIN_FIELDS = frozenset({
    "id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time", "agreement",
})  # fmt: skip
FIELDS = MIN_FIELDS | {
    "data", "annotations", "predictions", "drafts", "meta", "project", "file_upload", "inner_id",
    "total_annotations", "cancelled_annotations", "total_predictions", "comment_count",
    "unresolved_comment_count", "last_comment_updated_at", "comment_authors", "updated_by",
    "prompt", "left", "right",
}  # fmt: skip
LEFT_RIGHT = ("left", "right")


class Judgement(NamedTuple):
    """The verdict of one annotator, before it is known which answer is left."""

    question: str  # name of the tag in the labelling interface
    verdict: str  # `left`, `right`, or the text of a choice
    compared: str  # names of the compared tags, such as `answer1,answer2`; empty if unknown


def _parse(row: Row, rules: RowRules) -> list[PairOrError]:
    is_whole = isinstance(row.record.get("data"), dict)
    fields = dict(row.record["data"]) if is_whole else dict(row.record)
    # `--column` puts its fields into the row itself.
    fields |= {name: row.record[name] for name in ("prompt", *LEFT_RIGHT) if name in row.record}
    found = _read_annotations(row) if is_whole else [_read_min(row)]
    judgements = [judgement for judgement in found if judgement is not None]
    if not judgements:
        return [BadPairError(row.location, UNJUDGED)]
    prompt_name = require_prompt(fields, row.location, "data." if is_whole else "")
    names = _find_answers(fields, judgements[0], prompt_name, row.location)
    vote = find_majority(_parse_vote(judgement, names, row.location) for judgement in judgements)
    if vote == 0:
        return [BadPairError(row.location, TIED)]
    prompt, left, right = (
        parse_content(fields[name], name, row.location) for name in (prompt_name, *names)
    )
    chosen, rejected = (left, right) if vote < 0 else (right, left)
    return make_pair(row, prompt, chosen, rejected)


def _read_annotations(row: Row) -> list[Judgement | None]:
    """Return the judgement of each annotation that was submitted."""
    annotations = row.record.get("annotations")
    if not isinstance(annotations, list) or not all(isinstance(a, dict) for a in annotations):
        raise DataError(f"{row.location}: `annotations` must be a list of objects")
    return [
        _read_results(annotation.get("result"), row.location)
        for annotation in annotations
        if not annotation.get("was_cancelled")
    ]


def _read_results(results: Any, location: str) -> Judgement | None:
    """Return the judgement in the results of one annotation; None if it has none.

    Raises:
        DataError: the annotation answers several such questions.
    """
    by_kind: dict[str, list[Judgement]] = {"pairwise": [], "choices": []}
    for result in results if isinstance(results, list) else ():
        kind = result.get("type") if isinstance(result, dict) else None
        if not isinstance(kind, str) or kind not in by_kind:
            continue
        value = result.get("value")
        verdict = _read_value(value if isinstance(value, dict) else {})
        if verdict is not None:
            question, compared = (str(result.get(name, "")) for name in ("from_name", "to_name"))
            by_kind[kind].append(Judgement(question, verdict, compared))
    return _take_single(by_kind["pairwise"] or by_kind["choices"], location)


def _read_value(value: Mapping[str, Any]) -> str | None:
    """Return the word that a `Pairwise` tag selects, or the one choice of a `Choices` tag."""
    if isinstance(value.get("selected"), str):
        return str(value["selected"])
    choices = value.get("choices")
    if isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], str):
        return choices[0]
    return None


def _take_single(judgements: list[Judgement], location: str) -> Judgement | None:
    if len(judgements) > 1:
        questions = format_names(dict.fromkeys(judgement.question for judgement in judgements))
        raise DataError(
            f"{location}: an annotation answers several questions (found {questions}); keep the "
            "results of one question"
        )
    return judgements[0] if judgements else None


def _read_min(row: Row) -> Judgement | None:
    """Return the judgement in a row of JSON_MIN, which has the results of one annotation.

    A `Pairwise` tag gives `[{"selected": "left"}]`, a choice its text.
    """
    record = row.record
    named = all(name in record for name in LEFT_RIGHT)
    answers = list(LEFT_RIGHT) if named else find_answer_fields(record)
    others = record.keys() - {*answers, *MIN_FIELDS, find_prompt_field(record)}
    pairwise, choices = [], []
    for name in sorted(others):
        value = record[name]
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
            if (verdict := _read_value(value[0])) is not None:
                pairwise.append(Judgement(name, verdict, ""))
        elif (
            isinstance(value, str)
            and len(answers) == 2
            and read_vote(value, (answers[0], answers[1])) is not None
        ):
            choices.append(Judgement(name, value, ""))
    return _take_single(pairwise or choices, row.location)


def _find_answers(
    fields: Mapping[str, Any], judgement: Judgement, prompt_name: str, location: str
) -> tuple[str, str]:
    """Return the names of the left and of the right answer.

    They are those that `--column` names, else the compared tags if the task has fields of these
    names, else the two fields with names of answers, else the two other text fields.

    Raises:
        DataError: none of these are two fields.
    """
    tags = [tag.strip() for tag in judgement.compared.split(",")]
    ignored = {prompt_name, judgement.question, *MIN_FIELDS}
    texts = [
        name for name, value in fields.items()
        if isinstance(value, str | list) and name not in ignored
    ]  # fmt: skip
    for names in (list(LEFT_RIGHT), tags, find_answer_fields(fields), texts):
        if len(names) == 2 and all(name in fields for name in names):
            return names[0], names[1]
    raise DataError(
        f"{location}: cannot tell which fields are the two answers (found {format_names(fields)}); "
        "name them: --column left=data.NAME --column right=data.NAME"
    )


def _parse_vote(judgement: Judgement, names: tuple[str, str], location: str) -> int:
    vote = read_vote(judgement.verdict, names)
    if vote is None:
        raise DataError(
            f"{location}: `{judgement.question}` does not say which answer is better (found "
            f"{judgement.verdict[:40]!r}); write left, right or tie there"
        )
    return vote


def _fits(record: Record) -> bool:
    if isinstance(record.get("data"), dict) and isinstance(record.get("annotations"), list):
        return True
    return {"annotation_id", "annotator", "lead_time"} <= record.keys()


LABEL_STUDIO = Schema("label-studio", _fits, _parse, FIELDS, has_own_names=True)
