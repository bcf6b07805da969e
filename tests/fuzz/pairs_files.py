"""Pairs files of every format, and the accounts that must be given of their rows."""

import bz2
import csv
import gzip
import io
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from tests.fuzz.case import FailedInputError
from tests.fuzz.mutations import dump

Rows = list[Any]
FORMATS = (
    *("rows.jsonl",) * 6,
    *("rows.json",) * 3,
    *("rows.csv",) * 2,
    *("rows.parquet",) * 2,
    "rows.jsonl.gz",
    "rows.json.bz2",
    "rows.csv.xz",
    "rows.jsonl.zst",
    "rows.parquet.gz",
)
COMPRESSORS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def write_rows(rows: Rows, name: str, changed: tuple[int, Any] | None = None) -> str | None:
    """Write rows, one of them changed, to a file; return its name, or None if they do not fit."""
    base, _, compression = name.partition(".")[2].partition(".")
    data = WRITERS[base](rows, changed)
    if data is None:
        return None
    if compression == "zst":
        data = pyarrow.Codec("zstd").compress(data, asbytes=True)
    elif compression:
        data = COMPRESSORS["." + compression](data)
    Path(name).write_bytes(data)
    return name


def _lines(rows: Rows, changed: tuple[int, Any] | None) -> list[bytes]:
    lines = [json.dumps(row).encode() for row in rows]
    if changed:
        lines[changed[0]] = dump(changed[1])
    return lines


def _json_lines(rows: Rows, changed: tuple[int, Any] | None) -> bytes:
    return b"".join(line + b"\n" for line in _lines(rows, changed))


def _json_list(rows: Rows, changed: tuple[int, Any] | None) -> bytes:
    return b"[" + b",\n".join(_lines(rows, changed)) + b"]"


def _csv(rows: Rows, changed: tuple[int, Any] | None) -> bytes | None:
    rows = _with_change(rows, changed)
    if not all(isinstance(row, dict) for row in rows):
        return None
    columns = list(dict.fromkeys(str(key) for row in rows for key in row))
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, columns)
    writer.writeheader()
    for row in rows:
        cells = {str(k): v if isinstance(v, str) else json.dumps(v) for k, v in row.items()}
        writer.writerow(cells)
    return stream.getvalue().encode("utf-8", "surrogatepass")


def _parquet(rows: Rows, changed: tuple[int, Any] | None) -> bytes | None:
    sink = io.BytesIO()
    try:
        table = pyarrow.Table.from_pylist(_with_change(rows, changed))
        pyarrow.parquet.write_table(table, sink)
    except (pyarrow.ArrowException, ValueError, TypeError, AttributeError, OverflowError):
        return None
    return sink.getvalue()


def _with_change(rows: Rows, changed: tuple[int, Any] | None) -> Rows:
    rows = list(rows)
    if changed:
        rows[changed[0]] = changed[1]
    return rows


WRITERS = {"jsonl": _json_lines, "json": _json_list, "csv": _csv, "parquet": _parquet}


def check_accounts(name: str, results: dict[str, Any]) -> None:
    """Raise `FailedInputError` unless every row became a pair or is named in a finding."""
    train = results["train"]
    if name == "rows.jsonl":
        count = _count_rows(Path(name).read_bytes())
        if train["rows"] != count:
            raise FailedInputError(f"{count} lines, but {train['rows']} rows")
    places = {
        place[0]
        for finding in train["findings"]
        if finding["unit"] == "rows" or finding["kind"] == "error"
        for place in finding["places"]
    }
    dropped = sum(len(rows) for report in train["reports"] for rows in report["dropped"].values())
    if train["pairs"] + max(len(places), dropped) < train["rows"]:
        raise FailedInputError(
            f"{train['rows']} rows, but {train['pairs']} pairs, {len(places)} reported"
        )


def _count_rows(data: bytes) -> int:
    """Return the number of lines with content, or of the rows of a list that is all of a file."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        document = None
    if isinstance(document, list):
        return len(document)
    return sum(bool(line.strip()) for line in data.split(b"\n"))


def is_list(name: str) -> bool:
    """Return whether a file is a single list, whose elements are the rows."""
    return Path(name).read_bytes().lstrip(b"\xef\xbb\xbf \n")[:1] == b"["


def check_rows_unchanged(name: str) -> None:
    """Raise `FailedInputError` unless `data clean` wrote all rows that it does not report."""
    report = json.loads(Path("out.report.json").read_text(encoding="utf-8"))
    dropped = {row["where"] for row in report["dropped_rows"]}
    expected = [
        line.strip()
        for number, line in enumerate(Path(name).read_bytes().split(b"\n"), start=1)
        if line.strip() and f"{name}:{number}" not in dropped
    ]
    written = [line.strip() for line in Path("out.jsonl").read_bytes().split(b"\n") if line.strip()]
    if [_value(line) for line in written] != [_value(line) for line in expected]:
        raise FailedInputError(
            f"{len(expected)} rows are not reported, but {len(written)} other rows are written"
        )


def _value(line: bytes) -> str:
    """Return a line's JSON value as text: the text compares NaN and keys that stand twice."""
    return json.dumps(json.loads(line.decode("utf-8-sig")))
