"""Write files and folders atomically: they appear under their name complete or not at all.

The content is written under a temporary name next to the target and renamed at the end. Temporary
names begin with `.mlx-dpo-` and contain the process id of the writer and a random number. They
therefore never collide with the name of a user's file, and leftovers of a killed process can be
distinguished from files that are being written.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

from mlx_dpo.io.write_errors import name_file

LONGEST_TARGET = 56  # characters of the target in a temporary name; names have at most 255 bytes
TEMPORARY = re.compile(r"\.mlx-dpo-(?P<process>\d{1,9})-[0-9a-f]{8}-(?P<target>.+)", re.DOTALL)

_being_written: set[str] = set()  # temporary names that this process is writing to


@contextmanager
def atomic_file(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write a file to, and rename the file to `path` at the end.

    If the block fails, the temporary file is removed. With `durable`, the content is flushed to the
    disk before the rename.
    """
    remove_abandoned(path.parent, path.name)
    with temporary_path(path) as temporary:
        yield temporary
        if durable:
            flush(temporary)
        os.replace(temporary, path)


def write_file(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Write or replace a file atomically, encoding text as UTF-8.

    With `durable`, the content is flushed to the disk before the file gets its name.
    """
    with atomic_file(path, durable=durable) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_folder(path: Path, *, durable: bool = False, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder to write to, and rename the folder to `path` at the end.

    If the block fails, the temporary folder is removed. With `durable`, the folder's files and the
    rename are flushed to the disk. With `overwrite`, an existing folder at `path` is removed before
    the rename.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent, path.name)
    with temporary_path(path) as temporary:
        temporary.mkdir()
        yield temporary
        if durable:
            for file in temporary.iterdir():
                flush(file)
        if overwrite:
            shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
        if durable:
            flush(path.parent)


@contextmanager
def temporary_path(path: Path) -> Iterator[Path]:
    """Yield an unused path next to `path`, with the same suffix; remove what is there at the end.

    Use this function if the content may not be renamed to `path` after all. Use it also in a
    folder that is shared with other machines, where a process id in a file name means nothing.
    Otherwise use `atomic_file` or `atomic_folder`.
    """
    name = f".mlx-dpo-{os.getpid()}-{token_hex(4)}-{path.name[-LONGEST_TARGET:]}"
    temporary = path.with_name(name)
    _being_written.add(name)
    try:
        with name_file(path, temporary):
            yield temporary
    finally:
        _being_written.discard(name)
        _remove(temporary)


def flush(path: Path) -> None:
    """Wait until the content of a file or folder has reached the disk.

    A rename may reach the disk before the content of the renamed file does.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_temporary(path: Path) -> bool:
    """Return whether the name of `path` has the form of this module's temporary names."""
    return TEMPORARY.fullmatch(path.name) is not None


def abandoned_paths(folder: Path, target: str | None = None) -> list[Path]:
    """Return the temporary files and folders in `folder` whose writer is not running any more.

    With `target`, return only those made for the file or folder named `target`.
    """
    return [
        path
        for path, process, name in _temporary_paths(folder)
        if not _is_written(path, process) and (target is None or name == target[-LONGEST_TARGET:])
    ]


def remove_abandoned(folder: Path, target: str | None = None) -> None:
    """Remove the temporary files and folders in `folder` whose writer is not running any more.

    With `target`, remove only those made for the file or folder named `target`. Files that cannot
    be removed are skipped.
    """
    for path in abandoned_paths(folder, target):
        with suppress(OSError):  # a leftover of another user, which is not in the way
            _remove(path)


def other_writer(path: Path) -> int | None:
    """Return the id of another running process that is writing `path`, or None."""
    for temporary, process, name in _temporary_paths(path.parent):
        is_target = name == path.name[-LONGEST_TARGET:]
        if is_target and process != os.getpid() and _is_written(temporary, process):
            return process
    return None


def _temporary_paths(folder: Path) -> list[tuple[Path, int, str]]:
    """List the temporary files and folders in `folder`.

    Returns:
        Tuples of the path, the process id of the writer, and the name of the file or folder that
        is being written.
    """
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, PermissionError):  # a folder may be writable but not readable
        return []
    matches = [match for name in names if (match := TEMPORARY.fullmatch(name))]
    return [(folder / m.string, int(m["process"]), m["target"]) for m in matches]


def _is_written(path: Path, process: int) -> bool:
    if process == os.getpid():  # or a leftover of an earlier process that had the same id
        return path.name in _being_written
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # a process of another user
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        path.unlink(missing_ok=True)
