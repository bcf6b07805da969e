"""Files -> rows: JSON objects, each with the place it came from. Knows no field names."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_dpo.errors import DataError

ENDINGS = (".jsonl", ".json")
TRAIN = ("train",)
HELD_OUT = ("valid", "validation", "eval", "test")  # the first that a folder has is taken


@dataclass(frozen=True, slots=True)
class Row:
    """One JSON object of a file."""

    record: dict[str, Any]
    where: str  # `file:line`, or `file[index]` counted from 0 in a JSON list


@dataclass(frozen=True)
class Sources:
    """The files that pairs come from."""

    train: Path
    valid: Path | None
    passed_over: Path | None = None  # the folder's own held-out file, where another was asked for


def find(pairs: str, valid: str | None = None) -> Sources:
    """The files that `pairs`, a file or a folder, and `valid`, a file, stand for.

    A folder holds `train` and perhaps `valid`, `validation`, `eval` or `test`, each as
    `.jsonl` or `.json`. A `valid` that is asked for goes before the folder's own.

    Raises:
        DataError: nothing is there, the ending is not read, or a folder has no or two train files.
    """
    typed = _readable(Path(valid)) if valid is not None else None
    place = Path(pairs)
    if not place.is_dir():
        return Sources(_readable(place), typed)
    train = _first(place, TRAIN)
    if train is None:
        looked_for = " or ".join(f"`train{ending}`" for ending in ENDINGS)
        raise DataError(f"{place}: no file with training pairs (looked for {looked_for})")
    own = _first(place, HELD_OUT)
    if typed is None:
        return Sources(train, own)
    return Sources(train, typed, passed_over=own if own and not own.samefile(typed) else None)


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the objects of a JSONL file, one a line, or of a JSON list, in file order.

    Raises:
        DataError: names the file, the line or index, and what was found there.
    """
    path = _readable(path)
    items = _lines(path) if path.suffix == ".jsonl" else _list(path)
    for where, item in items:
        if not isinstance(item, dict):
            raise DataError(f"{where}: expected an object, found {_kind(item)}")
        yield Row(item, where)


def _readable(path: Path) -> Path:
    if path.is_dir():
        raise DataError(f"{path}: is a folder; give a file that ends in `.jsonl` or `.json`")
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; pairs are read from files, not the Hub")
    if path.suffix not in ENDINGS:
        found = f"`{path.suffix}`" if path.suffix else "no ending"
        raise DataError(
            f"{path}: this kind of file is not read ({found}); "
            "give `.jsonl`, one object a line, or `.json`, a list of objects"
        )
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    return path


def _first(folder: Path, stems: tuple[str, ...]) -> Path | None:
    for stem in stems:
        found = [path for ending in ENDINGS if (path := folder / f"{stem}{ending}").is_file()]
        if len(found) > 1:
            names = " and ".join(f"`{path.name}`" for path in found)
            raise DataError(f"{folder}: holds both {names}; keep one of them")
        if found:
            return found[0]
    return None


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    # As bytes, so that only a newline ends a line and a bad byte is blamed on its own line.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path}:{number}"
                yield where, _parse(line.rstrip(), where)


def _list(path: Path) -> Iterator[tuple[str, Any]]:
    items = _parse(path.read_bytes(), str(path))
    if not isinstance(items, list):
        raise DataError(
            f"{path}: expected a list of objects, found {_kind(items)}; "
            "a file with one object a line must end in `.jsonl`"
        )
    for index, item in enumerate(items):
        yield f"{path}[{index}]", item


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise DataError(
            f"{where}: not UTF-8 (byte 0x{byte:02x} at {error.start}); save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise DataError(f"{where}: not JSON ({error.msg}, {at}column {error.colno})") from None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return names.get(type(value), "null" if value is None else "a number")
