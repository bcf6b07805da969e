"""One question in fields of its own: Alpaca's, Orca's, SHP's, and a `system` beside a prompt."""

from mlx_dpo.errors import DataError
from mlx_dpo.schemas.messages import pair, text_of
from mlx_dpo.schemas.schema import PairOrError, Record, Row, RowRules, Schema
from mlx_dpo.types import Message, Text

ALPACA_FIELDS = frozenset(
    {"instruction", "input", "output", "chosen", "rejected", "system", "history"}
)


def _read_alpaca(row: Row, rules: RowRules) -> list[PairOrError]:
    texts = [_optional(row, name) for name in ("instruction", "input")]
    output = row.record.get("output")
    if "chosen" not in row.record and isinstance(output, list):
        if len(output) != 2:
            raise DataError(f"{row.location}: `output` must be the chosen and the rejected answer")
        chosen, rejected = (text_of(text, "output", row.location) for text in output)
    else:
        chosen, rejected = _answers(row)
    question = "\n".join(text for text in texts if text)
    prompt = _after(row, question, [*_system(row), *_history(row)])
    return pair(row, prompt, chosen, rejected)


def _read_orca(row: Row, rules: RowRules) -> list[PairOrError]:
    name = "question" if "question" in row.record else "prompt"
    question = text_of(row.record.get(name), name, row.location)
    return pair(row, _after(row, question, _system(row)), *_answers(row))


def _read_shp(row: Row, rules: RowRules) -> list[PairOrError]:
    record, where = row.record, row.location
    answers = [text_of(record.get(f"human_ref_{x}"), f"human_ref_{x}", where) for x in "AB"]
    if record.get("labels") not in (0, 1):
        raise DataError(f"{where}: `labels` must be 1 where A was preferred, or 0")
    chosen, rejected = answers if record["labels"] else answers[::-1]
    return pair(row, text_of(record.get("history"), "history", where), chosen, rejected)


def _answers(row: Row) -> tuple[str, str]:
    chosen, rejected = (
        text_of(row.record.get(name), name, row.location) for name in ("chosen", "rejected")
    )
    return chosen, rejected


def _optional(row: Row, name: str) -> str:
    return text_of(row.record.get(name) or "", name, row.location)


def _system(row: Row) -> list[Message]:
    system = _optional(row, "system")
    return [{"role": "system", "content": system}] if system else []


def _history(row: Row) -> list[Message]:
    """LLaMA-Factory's earlier rounds: question and answer each."""
    rounds = row.record.get("history") or []
    if not isinstance(rounds, list) or any(
        not isinstance(one, list) or len(one) != 2 for one in rounds
    ):
        raise DataError(f"{row.location}: `history` must be a list of questions with their answers")
    return [
        {"role": role, "content": text_of(text, "history", row.location)}
        for one in rounds
        for role, text in zip(("user", "assistant"), one, strict=True)
    ]


def _after(row: Row, question: str, before: list[Message]) -> Text:
    """The question as text, or as the last of the turns before it."""
    return (*before, {"role": "user", "content": question}) if before else question


def _pair_of_texts(record: Record) -> bool:
    return isinstance(record.get("chosen"), str) and isinstance(record.get("rejected"), str)


def _alpaca(record: Record) -> bool:
    two = isinstance(record.get("output"), list)
    return "instruction" in record and "prompt" not in record and (two or _pair_of_texts(record))


def _orca(record: Record) -> bool:
    if not _pair_of_texts(record):
        return False
    if "prompt" in record:
        return bool(isinstance(record["prompt"], str) and record.get("system"))
    return "question" in record


ALPACA = Schema("alpaca", _alpaca, _read_alpaca, ALPACA_FIELDS)
ORCA = Schema(
    "orca", _orca, _read_orca, frozenset({"system", "question", "prompt", "chosen", "rejected"})
)
SHP = Schema(
    "shp",
    lambda record: "human_ref_A" in record and "human_ref_B" in record,
    _read_shp,
    frozenset({"history", "human_ref_A", "human_ref_B", "labels"}),
)
