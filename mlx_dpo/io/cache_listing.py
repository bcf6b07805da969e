"""List the files in a cache folder, for `mlx-dpo cache`."""

from collections.abc import Callable, Mapping
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


NOT_LABELS = {"path", "size", "last_used", "damaged"}  # fields that no file names for itself
LATEST = 2**32  # seconds; a damaged file system may return a time that no calendar has
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
    names = {field.name for field in fields(entry_type)} - NOT_LABELS
    entries = []
    for path in sorted(folder.glob(f"*{suffix}")):
        if is_temporary(path):
            continue
        try:
            status = path.lstat()
        except OSError:  # another process clears the cache
            continue
        labels = _valid_labels(read_labels(path) if path.is_file() else None)
        used = {name: value for name, value in (labels or {}).items() if name in names}
        entries.append(
            entry_type(
                path=path,
                size=status.st_size,
                last_used=datetime.fromtimestamp(min(max(status.st_mtime, 0), LATEST), UTC),
                damaged=labels is None,
                **used,
            )
        )
    return entries


def _valid_labels(labels: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return the labels unchanged, or None if one has the wrong type."""
    if labels is None:
        return None
    pairs = labels.get("pairs", 0)
    texts = [labels.get(name) for name in ("model", "computed_on", "name", "written")]
    is_valid = type(pairs) is int and all(text is None or isinstance(text, str) for text in texts)
    return labels if is_valid else None
