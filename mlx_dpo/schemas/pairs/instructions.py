"""Schemas with one instruction or question per row: Alpaca, Orca and SHP."""

from mlx_dpo.errors import DataError
from mlx_dpo.schemas.messages import make_pair, parse_json_field, parse_text
from mlx_dpo.schemas.schema import PairOrError, Record, Row, RowRules, Schema
from mlx_dpo.types import Message, Text

ALPACA_FIELDS = frozenset(
    {"instruction", "input", "output", "chosen", "rejected", "system", "history"}
)


def _parse_alpaca(row: Row, rules: RowRules) -> list[PairOrError]:
    output = row.record.get("output")
    if "chosen" not in row.record and isinstance(output, list):
        if len(output) != 2:
            raise DataError(f"{row.location}: `output` must be the chosen and the rejected answer")
        chosen, rejected = (parse_text(text, "output", row.location) for text in output)
    else:
        chosen, rejected = _parse_completions(row)
    return make_pair(row, parse_instruction(row), chosen, rejected)


def parse_instruction(row: Row) -> Text:
    """Return the prompt of an Alpaca row: `system`, `history`, and `instruction` with `input`.

    It is text if there is neither a system message nor a history.
    """
    texts = [_parse_optional_text(row, name) for name in ("instruction", "input")]
    question = "\n".join(text for text in texts if text)
    return _make_prompt(question, [*_system_message(row), *_parse_history(row)])


def _parse_orca(row: Row, rules: RowRules) -> list[PairOrError]:
    name = "question" if "question" in row.record else "prompt"
    question = parse_text(row.record.get(name), name, row.location)
    return make_pair(row, _make_prompt(question, _system_message(row)), *_parse_completions(row))


def _parse_shp(row: Row, rules: RowRules) -> list[PairOrError]:
    record, location = row.record, row.location
    answers = [parse_text(record.get(f"human_ref_{x}"), f"human_ref_{x}", location) for x in "AB"]
    if record.get("labels") not in (0, 1):
        raise DataError(f"{location}: `labels` must be 1 if A was preferred, otherwise 0")
    chosen, rejected = answers if record["labels"] else answers[::-1]
    return make_pair(row, parse_text(record.get("history"), "history", location), chosen, rejected)


def _parse_completions(row: Row) -> tuple[str, str]:
    chosen, rejected = (
        parse_text(row.record.get(name), name, row.location) for name in ("chosen", "rejected")
    )
    return chosen, rejected


def _parse_optional_text(row: Row, name: str) -> str:
    return parse_text(row.record.get(name) or "", name, row.location)


def _system_message(row: Row) -> list[Message]:
    system = _parse_optional_text(row, "system")
    return [{"role": "system", "content": system}] if system else []


def _parse_history(row: Row) -> list[Message]:
    """Return the messages of `history`, LLaMA-Factory's list of (question, answer) pairs."""
    rounds = row.record.get("history") or []
    if isinstance(rounds, str):
        rounds = parse_json_field(rounds, "history", row.location)
    if not isinstance(rounds, list) or any(
        not isinstance(round_, list) or len(round_) != 2 for round_ in rounds
    ):
        raise DataError(f"{row.location}: `history` must be a list of questions with their answers")
    return [
        {"role": role, "content": parse_text(text, "history", row.location)}
        for round_ in rounds
        for role, text in zip(("user", "assistant"), round_, strict=True)
    ]


def _make_prompt(question: str, earlier: list[Message]) -> Text:
    """Return `earlier` and the question as messages; without `earlier`, the question as text."""
    return (*earlier, {"role": "user", "content": question}) if earlier else question


def _has_text_pair(record: Record) -> bool:
    return isinstance(record.get("chosen"), str) and isinstance(record.get("rejected"), str)


def _is_alpaca(record: Record) -> bool:
    has_output_list = isinstance(record.get("output"), list)
    return (
        "instruction" in record
        and "prompt" not in record
        and (has_output_list or _has_text_pair(record))
    )


def _is_orca(record: Record) -> bool:
    if not _has_text_pair(record):
        return False
    if "prompt" in record:
        return bool(isinstance(record["prompt"], str) and record.get("system"))
    return "question" in record


ALPACA = Schema("alpaca", _is_alpaca, _parse_alpaca, ALPACA_FIELDS, lists=frozenset({"output"}))
ORCA = Schema(
    "orca", _is_orca, _parse_orca, frozenset({"system", "question", "prompt", "chosen", "rejected"})
)
SHP = Schema(
    "shp",
    lambda record: "human_ref_A" in record and "human_ref_B" in record,
    _parse_shp,
    frozenset({"history", "human_ref_A", "human_ref_B", "labels"}),
)
