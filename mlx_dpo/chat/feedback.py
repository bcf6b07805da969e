"""Preference rows (pairs and labelled answers) and the JSONL file that they are appended to.

Every row is flushed to disk before the program continues, so a crash loses no feedback.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from mlx_dpo.errors import DataError, reason
from mlx_dpo.io.atomic import atomic_file
from mlx_dpo.io.locks import lock_file
from mlx_dpo.types import Message, Text

Row = dict[str, Any]
LOCK_RISK = (
    "rows of two programs that write to one file at the same time can be mixed up: let only one "
    "write at a time, or choose a file on a local disk"
)


def unpaired_row(prompt: Text, answer: str, *, good: bool, provenance: Row) -> Row:
    """Return a row for KTO, with TRL's keys: `prompt`, `completion`, `label` (True if `good`)."""
    return {
        **_format_turns(prompt, completion=answer),
        "label": good,
        "provenance": provenance,
    }


def pair_row(prompt: Text, *, chosen: str, rejected: str, provenance: Row) -> Row:
    """Return a preference pair as a row with `prompt`, `chosen`, `rejected` and `provenance`."""
    return {**_format_turns(prompt, chosen=chosen, rejected=rejected), "provenance": provenance}


def _format_turns(prompt: Text, **answers: str) -> Row:
    """Return a row with the prompt under `prompt` and each answer under its argument name.

    If the prompt is a list of messages, each answer becomes a list with one message.
    """
    if isinstance(prompt, str):
        return {"prompt": prompt, **answers}
    turns: dict[str, list[Message]] = {
        name: [{"role": "assistant", "content": text}] for name, text in answers.items()
    }
    return {"prompt": list(prompt), **turns}


def has_same_answer(other: Row, row: Row) -> bool:
    """Return whether `other` is a label of the same answer as `row`, written by the same program.

    The program is named by `by` in the provenance.
    """
    return (
        has_same_prompt(other, row)
        and "completion" in other
        and other["completion"] == row["completion"]
    )


def has_same_prompt(other: Row, row: Row) -> bool:
    """Return whether `other` is about the same prompt as `row` and by the same program."""
    provenance = other.get("provenance")
    is_own = isinstance(provenance, dict) and provenance.get("by") == row["provenance"]["by"]
    return is_own and other.get("prompt") == row["prompt"]


def utc_timestamp() -> str:
    """Return the current time in UTC, to the second, in ISO format."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class JsonlFile:
    """An append-only JSONL file. Appending the first row creates the file and its folder.

    Raises:
        DataError: the path is a folder or does not end in `.jsonl`.
    """

    path: Path

    def __post_init__(self) -> None:
        if self.path.suffix != ".jsonl":
            raise DataError(
                f"{self.path}: rows are written as JSON lines; give a name that ends in `.jsonl`"
            )
        if self.path.is_dir():
            raise DataError(f"{self.path}: is a folder; give the name of a file")

    def repair(self) -> str | None:
        """Remove an incomplete last line from the file; return a note if one was removed.

        Raises:
            DataError: the file cannot be read or written, or its last line was never a row.
        """
        if not self.path.is_file():
            return None
        try:
            with self.open_locked() as file:
                return self._repair(file)
        except OSError as error:
            raise self._write_error(error) from error

    def append(self, row: Row) -> None:
        """Append a row and flush it to disk.

        Raises:
            DataError: the file cannot be written.
        """
        line = _format_row(row)
        try:  # around the whole: closing the file writes as well, and may fail
            with self.open_locked() as file:
                self._repair(file)
                _append_durably(file, line)
        except OSError as error:
            raise self._write_error(error) from error

    def replace(self, row: Row, is_outdated: Callable[[Row], bool]) -> list[Row]:
        """Append a row and remove the outdated ones, all or nothing; return those removed.

        Args:
            row: the row to append.
            is_outdated: says of a row whether it is removed.

        Raises:
            DataError: the file cannot be written.
        """
        return self.replace_all([row], is_outdated)

    def replace_all(self, rows: Sequence[Row], is_outdated: Callable[[Row], bool]) -> list[Row]:
        """Append rows and remove the outdated ones, all or nothing; return those removed.

        The arguments and the errors are those of `replace`.
        """
        lines = [_format_row(row) for row in rows]
        try:
            with self.open_locked() as file:
                self._repair(file)
                rest, removed = _split_rows(file, is_outdated)
                if removed:
                    self._rewrite([*rest, *lines])
                else:
                    _append_durably(file, b"".join(lines))
        except OSError as error:
            raise self._write_error(error) from error
        return removed

    def _rewrite(self, lines: list[bytes]) -> None:
        """Replace the content of the file, which a crash leaves either old or new."""
        target = self.path.resolve()
        with atomic_file(target, durable=True) as temporary:
            temporary.write_bytes(b"".join(lines))
            shutil.copymode(target, temporary)

    def open_locked(self) -> BinaryIO:
        """Open the file for appending, locked against other mlx-dpo processes.

        Raises:
            OSError: the file cannot be opened.
        """
        while True:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = open(self.path, "a+b")  # noqa: SIM115 (the caller closes it)
            lock_file(file, wait=True, risk=LOCK_RISK)
            if self._is_current(file):
                return file
            file.close()  # another process replaced the file while this one waited for the lock

    def _is_current(self, file: BinaryIO) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def _write_error(self, error: OSError) -> DataError:
        return DataError(
            f"{self.path}: cannot be written ({reason(error)}); choose another file for the rows"
        )

    def _repair(self, file: BinaryIO) -> str | None:
        """Remove an incomplete last line from the open file; return a note if one was removed."""
        if not (size := file.seek(0, os.SEEK_END)):
            return None
        file.seek(size - 1)
        if file.read() == b"\n":
            return None
        file.seek(0)
        data = file.read()
        start = data.rfind(b"\n") + 1
        try:
            json.loads(data[start:])
        except ValueError:
            self._check_cut_row(data[start:])
            file.truncate(start)
            return f"{self.path}: the last line was incomplete and has been removed"
        except RecursionError:  # no row of this program; reading it names the line
            return None
        file.write(b"\n")  # a complete row from an editor that writes no final newline
        return None

    def _check_cut_row(self, line: bytes) -> None:
        """Raise `DataError` unless a last line may be what a crash left of a row.

        That is the beginning of an object, or zeros where the content did not reach the disk.
        """
        if line.strip(b"\0 ")[:1] not in (b"", b"{"):
            raise DataError(
                f"{self.path}: the last line is not a JSON object, so no row is appended to the "
                "file; fix the line, or choose another file"
            )


def _append_durably(file: BinaryIO, line: bytes) -> None:
    file.write(line)
    file.flush()
    os.fsync(file.fileno())


def _split_rows(
    file: BinaryIO, is_outdated: Callable[[Row], bool]
) -> tuple[list[bytes], list[Row]]:
    """Return the lines of a file to keep, and the outdated rows."""
    rest: list[bytes] = []
    outdated: list[Row] = []
    file.seek(0)
    for line in file:
        row = _read_row(line)
        if row is not None and is_outdated(row):
            outdated.append(row)
        else:
            rest.append(line)
    return rest, outdated


def _format_row(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _read_row(line: bytes) -> Row | None:
    """Return the row of a line; None if the line is no row, which is left as it is."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
