"""Schemas of rows for instruction tuning (SFT): a conversation, or a prompt with its answer.

A row becomes one example: everything before the first scored turn is its prompt, and everything up
to the last scored turn its completion.
"""

from typing import Any

from mlx_dpo.errors import EMPTY_COMPLETION, EMPTY_PROMPT, BadPairError, DataError
from mlx_dpo.schemas.labelled import parse_label, parse_text_or_messages
from mlx_dpo.schemas.messages import (
    check_no_messages_in_text,
    get_field_type,
    has_content,
    parse_messages,
    parse_text,
    to_messages,
)
from mlx_dpo.schemas.pairs.hh_rlhf import ASSISTANT, parse_turns
from mlx_dpo.schemas.pairs.instructions import ALPACA_FIELDS, parse_instruction
from mlx_dpo.schemas.pairs.sharegpt import parse_conversation
from mlx_dpo.schemas.schema import Record, Row, RowRules, Schema, format_names
from mlx_dpo.types import Message, Text, UnpairedExample

PROMPT_NAMES = ("question", "query", "input", "instruction", "request")  # that an error suggests
ANSWER_NAMES = ("answer", "response", "output", "chosen", "reply", "target")


def check_no_label(row: Row) -> None:
    """Raise `DataError` if the row has a label, good or bad, which instruction tuning ignores."""
    if "label" not in row.record:
        return
    try:
        parse_label(row)
    except DataError:  # a field of another meaning
        return
    raise DataError(
        f"{row.location}: `label` says whether the answer is good, and loss_type `sft` would train "
        "on bad answers too; use --loss-type kto, or keep the good rows and remove `label`"
    )


def find_supervised(row: Row) -> Schema:
    """Return the first schema of instruction tuning that fits; raise `DataError` if none does."""
    record = row.record
    for schema in SUPERVISED_SCHEMAS.values():
        if schema.fits(record):
            return schema
    for schema in SUPERVISED_SCHEMAS.values():  # a list of another type: its schema says so
        if any(record.get(name) is not None for name in schema.lists):
            return schema
    names = [
        next((name for name in names if name in record), "")
        for names in (PROMPT_NAMES, ANSWER_NAMES)
    ]
    fields = ("prompt", "completion")
    columns = [f"--column {f}={name}" for f, name in zip(fields, names, strict=True) if name]
    is_known = len(columns) == len(fields) and not any(name in record for name in fields)
    raise DataError(
        f"{row.location}: no `messages`, no `conversations`, and no `prompt` with `completion` "
        f"(found {format_names(record)}); "
        + (f"did you mean {' '.join(columns)}?" if is_known else "write one of these fields")
    )


def fits_supervised(record: Record) -> bool:
    """Return True if the row has a conversation or an answer for instruction tuning."""
    return any(schema.fits(record) for schema in SUPERVISED_SCHEMAS.values())


def _is_scored(turn: Message) -> bool:
    return bool(turn["role"] == "assistant")


def _make_example(row: Row, turns: tuple[Message, ...], rules: RowRules) -> list[Any]:
    """Return the example of a conversation; turns after the assistant's last one are left out.

    Turns of the assistant before the first turn of the user are part of the prompt.
    """
    user = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), len(turns))
    scored = [i for i, turn in enumerate(turns) if i > user and _is_scored(turn)]
    if not scored:
        raise DataError(
            f"{row.location}: the conversation has no turn of the assistant after one of the user"
        )
    start, end = scored[0], scored[-1] + 1
    if rules.assistant_turns == "last":
        start = next(i for i in range(end, 0, -1) if not _is_scored(turns[i - 1]))
    return _make_pair(row, turns[:start], turns[start:end])


def _make_pair(row: Row, prompt: Text, completion: Text) -> list[Any]:
    for name, text in (("prompt", prompt), ("completion", completion)):
        check_no_messages_in_text(text, name, row.location)
    if not has_content(prompt):
        return [BadPairError(row.location, EMPTY_PROMPT)]
    if not has_content(completion):
        return [BadPairError(row.location, EMPTY_COMPLETION)]
    return [UnpairedExample(prompt, completion, True, row.location)]


def _parse_messages(row: Row, rules: RowRules) -> list[Any]:
    turns = parse_messages(row.record.get("messages"), "messages", row.location)
    return _make_example(row, turns, rules)


def _parse_conversations(row: Row, rules: RowRules) -> list[Any]:
    return _make_example(row, parse_conversation(row), rules)


def _parse_prompt_completion(row: Row, rules: RowRules) -> list[Any]:
    """Parse `prompt` and `completion`: all of the completion is scored, as in TRL."""
    for name in ("prompt", "completion"):
        get_field_type(row.record.get(name), name, row.location)
    prompt, completion = (parse_text_or_messages(row, name) for name in ("prompt", "completion"))
    if isinstance(prompt, str) and isinstance(completion, str):
        return _make_pair(row, prompt, completion)
    completion = to_messages(completion, "assistant")
    for turn in completion:
        if not _is_scored(turn):
            raise DataError(
                f"{row.location}: `completion` has a turn of `{turn['role']}`; it may contain only "
                "the assistant's turns; write a conversation of several answers as `messages`"
            )
    return _make_pair(row, to_messages(prompt, "user"), completion)


def _parse_alpaca(row: Row, rules: RowRules) -> list[Any]:
    prompt = parse_instruction(row)
    output = parse_text(row.record.get("output"), "output", row.location)
    if isinstance(prompt, str):
        return _make_pair(row, prompt, output)
    return _make_example(row, (*prompt, {"role": "assistant", "content": output}), rules)


def _parse_whole_text(row: Row, rules: RowRules) -> list[Any]:
    """Parse a dialogue with the turn marks `Human:` and `Assistant:`; refuse other text.

    Raises:
        DataError: the text does not say which part of it is the answer.
    """
    text = parse_text(row.record.get("text"), "text", row.location)
    turns = parse_turns(f"{text}{ASSISTANT}") if ASSISTANT in f"\n\n{text}" else None
    if turns is None:
        raise DataError(
            f"{row.location}: `text` does not say which part of it is the answer; write "
            "`messages`, or `prompt` and `completion`"
        )
    return _make_example(row, turns, rules)


def _has_text(name: str, *others: str) -> Any:
    def fits(record: Record) -> bool:
        return isinstance(record.get(name), str) and all(other in record for other in others)

    return fits


# In this order: the first schema that fits a row parses it. Names of pair schemas are used again
# where the rows differ in the answers alone.
SUPERVISED_SCHEMAS = {
    schema.name: schema
    for schema in (
        Schema(
            "messages",
            lambda record: isinstance(record.get("messages"), list),
            _parse_messages,
            frozenset({"messages"}),
            lists=frozenset({"messages"}),
        ),
        Schema(
            "sharegpt",
            lambda record: isinstance(record.get("conversations"), list),
            _parse_conversations,
            frozenset({"conversations", "system"}),
            lists=frozenset({"conversations"}),
        ),
        Schema(
            "prompt-completion",
            lambda record: "prompt" in record and "completion" in record,
            _parse_prompt_completion,
            frozenset({"prompt", "completion"}),
        ),
        Schema("alpaca", _has_text("output", "instruction"), _parse_alpaca, ALPACA_FIELDS),
        Schema("text", _has_text("text"), _parse_whole_text, frozenset({"text"})),
    )
}
