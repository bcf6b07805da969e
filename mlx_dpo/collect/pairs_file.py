"""The JSONL file of collected preference pairs, and the file of skipped prompts next to it.

These files are the only state of a collection: a restarted program finds in them which prompts
have a decision (a pair, or a reason to skip the prompt).
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_dpo.chat.feedback import JsonlFile, pair_row, utc_timestamp
from mlx_dpo.data.prompts import Prompt
from mlx_dpo.data.sources import read_rows
from mlx_dpo.errors import DataError, reason
from mlx_dpo.io.locks import lock_file
from mlx_dpo.schemas.messages import get_field_type, to_messages

Row = dict[str, Any]
PROVENANCE = "provenance"
LOCK_RISK = (
    "two programs that collect into one file would both decide the same prompts: start only one, "
    "or choose a file on a local disk"
)


@contextmanager
def lock_pairs(path: Path) -> Iterator[None]:
    """Keep other programs from collecting into the file `path` inside the block.

    The lock is a hidden file next to `path`, because each write locks `path` itself. The system
    releases the lock however the program ends.

    Raises:
        DataError: another program collects into the file, or its folder cannot be written.
    """
    JsonlFile(path)  # checks the name before anything is written
    lock, made = path.with_name(f".{path.name}.lock"), not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({reason(error)}); choose another file for the rows"
        ) from error
    with file:
        try:
            lock_file(file, wait=False, risk=LOCK_RISK)
        except BlockingIOError:
            raise DataError(
                f"{path}: another program is writing decisions to it; wait for it, or choose "
                "another file"
            ) from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            if made:
                with suppress(OSError):  # it has the rows
                    path.parent.rmdir()


@dataclass(frozen=True)
class Decision:
    """The result for one prompt: a preference pair, or the reason why there is none."""

    prompt: Prompt
    provenance: Row
    chosen: str | None = None
    rejected: str | None = None
    skip_reason: str | None = None  # tie, skipped, …
    answers: tuple[str, ...] = ()  # of a prompt without a pair


@dataclass(frozen=True)
class StoredDecision:
    """A decision as stored: its row, its number, and the file (pairs or skipped prompts)."""

    number: int
    file: JsonlFile
    row: Row

    @property
    def prompt_key(self) -> str:
        """Digest that identifies the prompt of the decision."""
        prompt = self.row["prompt"]
        return Prompt(to_messages(prompt if isinstance(prompt, str) else tuple(prompt), "user")).key


@dataclass
class PairsFile:
    """The decisions about prompts: pairs in the file `path`, skipped prompts in a second file.

    Creating the object reads both files and removes incomplete last lines.

    Raises:
        DataError: a line of a file is not a JSON object, or a decision lacks its prompt.
    """

    path: Path
    notes: list[str] = field(default_factory=list)  # about repaired files
    decisions: list[StoredDecision] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pairs = JsonlFile(self.path)
        self.skipped = JsonlFile(self.path.with_suffix(".passed.jsonl"))
        for file in (self.pairs, self.skipped):
            if note := file.repair():
                self.notes.append(note)
            for row in read_rows(file.path) if file.path.is_file() else ():
                if (number := decision_number(row.record)) is not None:
                    _check_decision(row.record, row.location, is_pair=file is self.pairs)
                    self.decisions.append(StoredDecision(number, file, row.record))
        self.decisions.sort(key=lambda decision: decision.number)
        self.decided_keys = {decision.prompt_key for decision in self.decisions}

    @property
    def pair_count(self) -> int:
        """Number of decisions that are pairs."""
        return sum(decision.file is self.pairs for decision in self.decisions)

    def add(self, decision: Decision) -> None:
        """Append a decision to the file of pairs or of skipped prompts, and flush it to disk."""
        number = self.decisions[-1].number + 1 if self.decisions else 1
        provenance = {"number": number, "time": utc_timestamp()} | decision.provenance
        prompt = decision.prompt.messages
        if decision.chosen is not None and decision.rejected is not None:
            file = self.pairs
            row = pair_row(
                prompt,
                chosen=decision.chosen,
                rejected=decision.rejected,
                provenance=provenance,
            )
        else:
            file = self.skipped
            row = {
                "prompt": list(prompt),
                "passed": decision.skip_reason,
                "answers": list(decision.answers),
                PROVENANCE: provenance,
            }
        self.restore(StoredDecision(number, file, row))

    def restore(self, decision: StoredDecision) -> None:
        """Write the row of a stored decision again, after `undo` has removed it."""
        decision.file.append(decision.row)
        self.decisions.append(decision)
        self.decided_keys.add(decision.prompt_key)

    def undo(self) -> StoredDecision | None:
        """Remove the last decision from its file and return it; return None if there is none.

        Raises:
            DataError: another program has appended to the file.
        """
        if not self.decisions:
            return None
        last = self.decisions[-1]
        remove_last_line(last.file.path, last.number)
        self.decisions.pop()
        self.decided_keys = {decision.prompt_key for decision in self.decisions}
        return last


def _check_decision(record: Row, location: str, *, is_pair: bool) -> None:
    """Raise `DataError` if a row with the number of a decision is not as this program writes it."""
    get_field_type(record.get("prompt"), "prompt", location)
    if not is_pair:
        get_field_type(record.get("passed"), "passed", location)
    source = record[PROVENANCE].get("chosen_from", {})
    if not isinstance(source, dict):
        raise DataError(
            f"{location}: `chosen_from` must be an object, found {type(source).__name__}; restore "
            "the row, or remove it to decide its prompt again"
        )


def decision_number(record: Row) -> int | None:
    """Return the number of the decision that a row stores; None if the row has no number."""
    provenance = record.get(PROVENANCE)
    number = provenance.get("number") if isinstance(provenance, dict) else None
    return number if isinstance(number, int) else None


def remove_last_line(path: Path, number: int) -> None:
    """Remove the last line of a file, which must store decision `number`.

    Truncating is atomic, so a crash leaves the line either complete or removed.

    Raises:
        DataError: the last line is not that decision, or the file cannot be written.
    """
    try:
        path.stat()  # opening would make a file that someone has removed
        with JsonlFile(path).open_locked() as file:
            file.seek(0)
            data = file.read()
            start = data.rstrip(b"\n").rfind(b"\n") + 1
            if _stored_number(data[start:]) != number:
                raise DataError(
                    f"{path}: another program wrote after the last decision; it is not undone"
                )
            file.truncate(start)
            os.fsync(file.fileno())
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({reason(error)}); the last decision is not undone"
        ) from error


def _stored_number(line: bytes) -> int | None:
    """Return the number of the decision that a line stores, or None."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return decision_number(record) if isinstance(record, dict) else None
