"""The files of a collection: pairs that `train` reads, and beside them the prompts passed over.

What was decided is what the files say; a program that starts again knows nothing else.
"""

import fcntl
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_dpo.chat.feedback import JsonlFile, pair_row, utc_timestamp
from mlx_dpo.data.prompts import Prompt
from mlx_dpo.data.sources import read_rows
from mlx_dpo.errors import DataError
from mlx_dpo.schemas.messages import to_messages

Row = dict[str, Any]
PROVENANCE = "provenance"


@dataclass(frozen=True)
class Decision:
    """What became of one prompt: a pair of answers, or the reason why there is none."""

    prompt: Prompt
    provenance: Row
    chosen: str | None = None
    rejected: str | None = None
    passed: str | None = None  # tie, skipped, …
    answers: tuple[str, ...] = ()  # of a prompt that was passed over


@dataclass(frozen=True)
class StoredDecision:
    """A pick as it stands in its file."""

    number: int
    journal: JsonlFile
    row: Row

    @property
    def key(self) -> str:
        """Of its prompt."""
        prompt = self.row["prompt"]
        return Prompt(to_messages(prompt if isinstance(prompt, str) else tuple(prompt), "user")).key


@dataclass
class PairsFile:
    """The picks in `path` and in the file of those passed over, in the order they were made."""

    path: Path
    notes: list[str] = field(default_factory=list)  # what had to be mended
    order: list[StoredDecision] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Mend and read both files.

        Raises:
            DataError: a line of them is no row.
        """
        self.pairs = JsonlFile(self.path)
        self.passed = JsonlFile(self.path.with_suffix(".passed.jsonl"))
        for journal in (self.pairs, self.passed):
            if note := journal.repair():
                self.notes.append(note)
            for row in read_rows(journal.path) if journal.path.is_file() else ():
                if (number := decision_number(row.record)) is not None:
                    self.order.append(StoredDecision(number, journal, row.record))
        self.order.sort(key=lambda kept: kept.number)
        self.done = {kept.key for kept in self.order}

    def count(self, journal: JsonlFile) -> int:
        """Picks in one of the two files."""
        return sum(kept.journal is journal for kept in self.order)

    def add(self, pick: Decision) -> None:
        """Write a pick; it is on disk when this returns."""
        number = self.order[-1].number + 1 if self.order else 1
        told = {"number": number, "time": utc_timestamp()} | pick.provenance
        if pick.chosen is not None and pick.rejected is not None:
            journal = self.pairs
            row = pair_row(
                pick.prompt.messages, chosen=pick.chosen, rejected=pick.rejected, provenance=told
            )
        else:
            journal = self.passed
            row = {"prompt": list(pick.prompt.messages), "passed": pick.passed}
            row |= {"answers": list(pick.answers), PROVENANCE: told}
        self.put_back(StoredDecision(number, journal, row))

    def put_back(self, kept: StoredDecision) -> None:
        """Write a row that was taken off."""
        kept.journal.append(kept.row)
        self.order.append(kept)
        self.done.add(kept.key)

    def undo(self) -> StoredDecision | None:
        """Take the last pick off its file; None where there is none.

        Raises:
            DataError: another program has written behind it.
        """
        if not self.order:
            return None
        last = self.order[-1]
        remove_last_line(last.journal.path, last.number)
        self.order.pop()
        self.done = {kept.key for kept in self.order}
        return last


def decision_number(record: Row) -> int | None:
    """The number of a pick, None of a row that something else wrote."""
    told = record.get(PROVENANCE)
    number = told.get("number") if isinstance(told, dict) else None
    return number if isinstance(number, int) else None


def remove_last_line(path: Path, number: int) -> None:
    """Cut the last line off a file, if it is the pick of that number.

    A file's length changes at once or not at all, so a crash leaves either all of it or the rest.
    """
    with path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as `Journal` does before it writes
        data = file.read()
        start = data.rstrip(b"\n").rfind(b"\n") + 1
        if decision_number(json.loads(data[start:] or b"{}")) != number:
            raise DataError(f"{path}: something else wrote behind the last pick; it is kept")
        file.truncate(start)
        os.fsync(file.fileno())
