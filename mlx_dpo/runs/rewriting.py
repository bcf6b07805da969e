"""What splitting and cleaning share: rows read twice, and files that are there whole or not at all.

Rows stay as they were written: lines of JSON byte for byte, others as the JSON that they say.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mlx_dpo.config import DPOConfig
from mlx_dpo.errors import ConfigError, DataError
from mlx_dpo.preferences.sources import STDIN, Source
from mlx_dpo.preferences.written import Written, written


def all_rows(sources: Sequence[Source]) -> Iterator[Written]:
    """Every row of every source, in order."""
    for source in sources:
        yield from written(source)


def write_row(stream: IO[bytes], one: Written) -> None:
    """One row as a line."""
    stream.write(one.as_line() + b"\n")


def refuse_read_once(sources: Sequence[Source]) -> None:
    """ConfigError for standard input."""
    if any(source.name == STDIN for source in sources):
        raise ConfigError("`-` can be read but once, and rows are read twice here; give a file")


def refuse_pairing(config: DPOConfig) -> None:
    """ConfigError for rows that make a pair together."""
    if config.pair_labelled:
        raise ConfigError(
            "`pair_labelled` has no effect where rows are written as they are; use --loss-type kto"
        )


def refuse_changed(found: int, before: int, source: Source) -> None:
    """DataError where a second reading had not as many rows."""
    if found != before:
        raise DataError(f"{source.name}: changed while it was read; nothing was written")


def refuse_taken(path: Path) -> None:
    """ConfigError for a place where something is already."""
    if path.exists():
        raise ConfigError(f"{path}: is there already; name another place, or remove it")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder that is there when all is written, and not before."""
    partial = folder.with_name(f"partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that is there when all is written, and not before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"partial-{path.name}")
    try:
        with partial.open("wb") as stream:
            yield stream
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
