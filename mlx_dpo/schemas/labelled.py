"""Schema of unpaired preferences (KTO): one completion per row with a label, good or bad."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from mlx_dpo.errors import EMPTY_COMPLETION, UNPAIRED, BadPairError, DataError
from mlx_dpo.schemas.messages import (
    get_field_type,
    has_content,
    make_pair,
    parse_messages,
    parse_text,
    prompt_digest,
    to_messages,
)
from mlx_dpo.schemas.pairs.compared import find_answers
from mlx_dpo.schemas.pairs.sharegpt import parse_conversation
from mlx_dpo.schemas.schema import PairOrError, Row, RowRules, Schema
from mlx_dpo.types import Text, UnpairedExample

FIELDS = frozenset({"prompt", "completion", "messages", "conversations", "label"})
LABELS = {"true": True, "false": False, "1": True, "0": False}  # as text, for CSV


def pair_by_prompt(examples: Iterable[UnpairedExample]) -> list[PairOrError]:
    """Pair the n-th good completion of each prompt with the n-th bad completion of that prompt.

    Completions without a partner become `BadPairError`s with the reason `UNPAIRED`.
    """
    by_prompt: defaultdict[str, tuple[list[UnpairedExample], list[UnpairedExample]]]
    by_prompt = defaultdict(lambda: ([], []))
    for example in examples:
        by_prompt[prompt_digest(example)][not example.desirable].append(example)
    pairs: list[PairOrError] = []
    for good, bad in by_prompt.values():
        for chosen, rejected in zip(good, bad, strict=False):
            row = Row({}, f"{chosen.location} and {rejected.location}")
            pairs += [
                pair
                if isinstance(pair, BadPairError)
                else replace(pair, template_kwargs=chosen.template_kwargs)
                for pair in make_pair(row, chosen.prompt, chosen.completion, rejected.completion)
            ]
        shorter = min(len(good), len(bad))
        pairs += [
            BadPairError(example.location, UNPAIRED)
            for example in (*good[shorter:], *bad[shorter:])
        ]
    return pairs


def _parse(row: Row, rules: RowRules) -> list[UnpairedExample]:
    desirable = parse_label(row)
    prompt, completion = _parse_completion(row)
    if not has_content(completion):
        raise BadPairError(row.location, EMPTY_COMPLETION)
    return [UnpairedExample(prompt, completion, desirable, row.location)]


def parse_label(row: Row) -> bool:
    """Return the field `label`; raise `DataError` if it is neither true nor false."""
    label = row.record.get("label")
    if isinstance(label, str):
        label = LABELS.get(label.strip().lower(), label)
    if not isinstance(label, bool | int) or label not in (0, 1):
        raise DataError(f"{row.location}: `label` must be true or false, found {label!r}"[:300])
    return bool(label)


def _parse_completion(row: Row) -> tuple[Text, Text]:
    """Return the prompt and the completion of a labelled row."""
    record = row.record
    for name in ("messages", "conversations"):
        if name not in record:
            continue
        turns = (
            parse_conversation(row)
            if name != "messages"
            else parse_messages(record[name], name, row.location)
        )
        *earlier, last = turns
        if last["role"] != "assistant" or not earlier:
            raise DataError(
                f"{row.location}: `{name}` must end with the assistant's answer to earlier turns, "
                f"found a turn of `{last['role']}`"
            )
        return tuple(earlier), (last,)
    for name in ("prompt", "completion"):
        if name not in record:
            raise DataError(
                f"{row.location}: missing `{name}` in a row with a `label`; add it, or `messages`"
            )
    prompt, completion = (parse_text_or_messages(row, name) for name in ("prompt", "completion"))
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt, completion
    return to_messages(prompt, "user"), to_messages(completion, "assistant")


def parse_text_or_messages(row: Row, name: str) -> Text:
    """Return a field that holds text or messages, parsed."""
    value = row.record[name]
    if get_field_type(value, name, row.location) == "text":
        return parse_text(value, name, row.location)
    return parse_messages(value, name, row.location)


LABELLED = Schema(
    "labelled",
    lambda record: "label" in record and find_answers(record) is None,
    _parse,
    FIELDS,
    unpaired=True,
    has_labels=True,
)
