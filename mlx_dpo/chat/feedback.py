"""What a person, a judge or a rule found of answers, as rows that `train` reads.

Rows are appended to a JSONL file the moment they are made; whatever ends the program, they stay.
"""

import fcntl
import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from mlx_dpo.errors import DataError, reason
from mlx_dpo.types import Message, Text

Row = dict[str, Any]


def unpaired_row(prompt: Text, answer: str, *, good: bool, provenance: Row) -> Row:
    """One answer that was found good or bad by itself, as KTO takes it."""
    return {
        **_format_turns(prompt, completion=answer),
        "label": good,
        "provenance": provenance,
    }


def pair_row(prompt: Text, *, chosen: str, rejected: str, provenance: Row) -> Row:
    """Two answers to the same prompt, the better one and the other."""
    return {**_format_turns(prompt, chosen=chosen, rejected=rejected), "provenance": provenance}


def _format_turns(prompt: Text, **answers: str) -> Row:
    """As messages where the prompt is messages, else as plain text."""
    if isinstance(prompt, str):
        return {"prompt": prompt, **answers}
    turns: dict[str, list[Message]] = {
        name: [{"role": "assistant", "content": text}] for name, text in answers.items()
    }
    return {"prompt": list(prompt), **turns}


def utc_timestamp() -> str:
    """The time of a row: UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class JsonlFile:
    """A JSONL file that rows are appended to; it and its folder appear with the first one."""

    path: Path

    def __post_init__(self) -> None:
        if self.path.suffix != ".jsonl":
            raise DataError(f"{self.path}: rows are written one a line; give a name in `.jsonl`")
        if self.path.is_dir():
            raise DataError(f"{self.path}: is a folder; give the name of a file")

    def mend(self) -> str | None:
        """Take off the end of a line that was never finished; says so, or None.

        Raises:
            DataError: the file cannot be read or written.
        """
        if not self.path.is_file():
            return None
        with self._opened() as file:
            return self._mend(file)

    def append(self, row: Row) -> None:
        """Add a row; it is on disk when this returns.

        Raises:
            DataError: the file cannot be written.
        """
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        with self._opened() as file:
            self._mend(file)
            try:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                raise self._unwritable(error) from error

    def _opened(self) -> BinaryIO:
        """The file, held against other programs that append to it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = open(self.path, "a+b")  # noqa: SIM115 (the caller closes it)
        except OSError as error:
            raise self._unwritable(error) from error
        fcntl.flock(file, fcntl.LOCK_EX)
        return file

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(
            f"{self.path}: cannot be written ({reason(error)}); choose another file for the rows"
        )

    def _mend(self, file: BinaryIO) -> str | None:
        if not (size := file.seek(0, os.SEEK_END)):
            return None
        file.seek(size - 1)
        if file.read() == b"\n":
            return None
        file.seek(0)
        data = file.read()
        kept = data.rfind(b"\n") + 1
        try:
            json.loads(data[kept:])
        except ValueError:
            file.truncate(kept)
            return f"{self.path}: the last line was never finished; it is taken off"
        file.write(b"\n")  # whole, from an editor that ends no last line
        return None
