"""List the files in a cache folder, for `mlx-dpo cache`."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from mlx_dpo.io.atomic import is_temporary

UNKNOWN = "unknown"  # label of a damaged file, or of a file that was written without labels


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """A file of a cache, with the labels (model, number of pairs, ...) that the file contains."""

    path: Path
    model: str = UNKNOWN
    pairs: int = 0
    size: int  # bytes
    written: str | None = None  # time in ISO format
    last_used: datetime
    damaged: bool  # the file will be ignored and its content computed again


Entry = TypeVar("Entry", bound=CacheEntry)


def list_cache(
    folder: Path,
    suffix: str,
    entry_type: type[Entry],
    read_labels: Callable[[Path], Mapping[str, Any] | None],
) -> list[Entry]:
    """Return an entry for each file in `folder` with this suffix, sorted by file name.

    Args:
        folder: Cache folder; it need not exist.
        suffix: Suffix of the file names.
        entry_type: Class of the entries. Labels that are not fields of this class are ignored.
        read_labels: Returns the labels of a file, or None if the file is damaged.
    """
    names = {field.name for field in fields(entry_type)}
    entries = []
    for path in sorted(folder.glob(f"*{suffix}")):
        if is_temporary(path):
            continue
        with suppress(FileNotFoundError):  # another process clears the cache
            labels, status = read_labels(path), path.stat()
            used = {name: value for name, value in (labels or {}).items() if name in names}
            entries.append(
                entry_type(
                    path=path,
                    size=status.st_size,
                    last_used=datetime.fromtimestamp(status.st_mtime, UTC),
                    damaged=labels is None,
                    **used,
                )
            )
    return entries
