"""Answers that were judged one by one, as KTO takes them: rows -> judgements -> token ids."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from mlx_dpo.errors import ConfigError, DataError
from mlx_dpo.preferences import schemas
from mlx_dpo.preferences.columns import prompts
from mlx_dpo.preferences.faults import EMPTY, UNPAIRED, BadPair
from mlx_dpo.preferences.rows import Row
from mlx_dpo.preferences.schemas import Outcome, RowRules, Schema
from mlx_dpo.preferences.schemas.messages import (
    as_turns,
    kind_of,
    pair,
    refuse_media,
    said,
    template_input,
    text_of,
    turns_of,
)
from mlx_dpo.preferences.schemas.sharegpt import conversation
from mlx_dpo.preferences.views import StoredPairs
from mlx_dpo.types import Judgement, Text, TokenizedPair

FIELDS = frozenset({"prompt", "completion", "messages", "conversations", "label"})
LABELS = {"true": True, "false": False, "1": True, "0": False}  # as CSV has them


def schema_of(row: Row, rules: RowRules = schemas.DEFAULT) -> Schema:
    """How the row is written: as a judged answer, or as a pair, which is two of them.

    Raises:
        DataError: it is neither.
    """
    if rules.schema == LABELLED.name or (rules.schema is None and "label" in row.record):
        return LABELLED
    return schemas.schema_of(row, rules)


def to_judgements(row: Row, schema: Schema, rules: RowRules = schemas.DEFAULT) -> list[Judgement]:
    """One judgement of a labelled row, two of a pair: chosen is good, rejected is bad.

    Raises:
        DataError: a field is missing or of another kind.
        BadPair: the row says nothing.
    """
    if schema is not LABELLED:
        return [
            Judgement(one.prompt, text, good, row.where, one.given, one.whole)
            for one in schemas.to_preferences(row, rules)
            for text, good in ((one.chosen, True), (one.rejected, False))
        ]
    refuse_media(row)
    desirable = _label(row)
    prompt, completion = _answer(row)
    if not said(completion):
        raise BadPair(row.where, EMPTY)
    given = template_input(row.record, row.record.get("tools"), row.where)
    return [Judgement(prompt, completion, desirable, row.where, given)]


def _label(row: Row) -> bool:
    label = row.record.get("label")
    if isinstance(label, str):
        label = LABELS.get(label.strip().lower(), label)
    if not isinstance(label, bool | int) or label not in (0, 1):
        raise DataError(f"{row.where}: `label` must be true or false, found {label!r}"[:300])
    return bool(label)


def _answer(row: Row) -> tuple[Text, Text]:
    """The prompt and the answer of a labelled row."""
    record = row.record
    for name in ("messages", "conversations"):
        if name not in record:
            continue
        turns = conversation(row) if name != "messages" else turns_of(record[name], name, row.where)
        *earlier, last = turns
        if last["role"] != "assistant" or not earlier:
            raise DataError(
                f"{row.where}: `{name}` must end with the assistant's answer to earlier turns, "
                f"found a turn of `{last['role']}`"
            )
        return tuple(earlier), (last,)
    for name in ("prompt", "completion"):
        if name not in record:
            raise DataError(f"{row.where}: a labelled row without `{name}`; add it, or `messages`")
    prompt, completion = (_text(row, name) for name in ("prompt", "completion"))
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt, completion
    return as_turns(prompt, "user"), as_turns(completion, "assistant")


def _text(row: Row, name: str) -> Text:
    value = row.record[name]
    if kind_of(value, name, row.where) == "text":
        return text_of(value, name, row.where)
    return turns_of(value, name, row.where)


def _no_pair(row: Row, rules: RowRules) -> list[Outcome]:
    raise DataError(f"{row.where}: a single judged answer, and no pair")


LABELLED = Schema("labelled", lambda record: "label" in record, _no_pair, FIELDS)


def paired(judgements: Iterable[Judgement]) -> list[Outcome]:
    """The n-th good answer to a prompt beside the n-th bad one; those left over are faults."""
    by_prompt: defaultdict[str, tuple[list[Judgement], list[Judgement]]]
    by_prompt = defaultdict(lambda: ([], []))
    for one in judgements:
        by_prompt[schemas.asked(one)][not one.desirable].append(one)
    found: list[Outcome] = []
    for good, bad in by_prompt.values():
        for better, worse in zip(good, bad, strict=False):
            row = Row({}, f"{better.where} and {worse.where}")
            found += [
                replace(made, given=better.given) if not isinstance(made, BadPair) else made
                for made in pair(row, better.prompt, better.completion, worse.completion)
            ]
        shorter = min(len(good), len(bad))
        found += [BadPair(one.where, UNPAIRED) for one in (*good[shorter:], *bad[shorter:])]
    return found


def with_mismatched(rows: Sequence[TokenizedPair], max_length: int) -> Sequence[TokenizedPair]:
    """Each judged answer with an answer to another prompt as `rejected`, cut to `max_length`.

    The answers are all those of the rows, turned against their prompts: KTO estimates by them
    how far the policy has moved from the reference, which the bad ones alone would not tell.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1: outputs of the same data,
    shifted against the inputs.

    Raises:
        ConfigError: all rows have the same prompt.
    """
    others = _others(prompts(rows))
    if isinstance(rows, StoredPairs):
        return rows.against(others, max_length)
    return [
        replace(row, rejected=rows[other].chosen[: max(1, max_length - len(row.prompt))])
        for row, other in zip(rows, others, strict=True)
    ]


def _others(asked: Sequence[object]) -> list[int]:
    """For each row the place of one that was asked something else.

    Every answer is taken once: good and bad ones as often as there are. Only where more than
    half of the rows have one prompt are those of the others taken again.
    """
    places: defaultdict[object, list[int]] = defaultdict(list)
    for place, prompt in enumerate(asked):
        places[prompt].append(place)
    if len(places) == 1:
        raise ConfigError(
            "loss_type `kto` needs rows of at least two prompts in training and in held-out "
            "rows: it compares each with the answer to another one; give more, or "
            "--valid-fraction 0"
        )
    together = [place for group in places.values() for place in group]
    most = max(map(len, places.values()), default=0)
    others = [0] * len(asked)
    if 2 * most <= len(asked):  # the largest group, moved by its size, leaves itself behind
        for at, place in enumerate(together):
            others[place] = together[at - most]
        return others
    largest = max(places.values(), key=len)
    elsewhere = sorted(set(together) - set(largest))
    for group, answers in ((largest, elsewhere), (elsewhere, largest)):
        for at, place in enumerate(group):
            others[place] = answers[at % len(answers)]
    return others
