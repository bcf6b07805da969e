"""Checksums of the files that runs depend on, stored in the files and verified on reading.

Each file contains the SHA-256 of its own content, so no crash can come between a file and its
checksum. A safetensors file has it in the metadata of its header, a JSON object under a key, and
each line of a JSON Lines file has a CRC-32. A second entry names mlx-dpo as the writer: if one of
the two entries is there and the other is not, the file is damaged. A file with neither was written
by another program or by an earlier version, and is read without a check.
"""

import json
import os
import re
import stat
import time
import zlib
from collections.abc import Mapping
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from mlx_dpo.errors import DamagedFileError, reason
from mlx_dpo.io import bounded
from mlx_dpo.io.arrays import Arrays, read_arrays, write_arrays

DIGEST, WRITER = "mlx_dpo_sha256", "written_by"
NAME = "mlx-dpo"
EDITED = "edited"  # as the digest of a JSON file: a person changed the file on purpose
RESTORE = "restore it from a copy"
IF_EDITED = f'{RESTORE} (or, if you edited it, set its "{DIGEST}" to "{EDITED}")'

WRONG = "its content does not match its checksum"
MISSING = "its checksum is missing"
NOT_FOUND = "it is missing"

_ZEROS = b"0" * 64
_STORED = re.compile(rb'"%s":"([0-9a-f]{64})"' % DIGEST.encode())
_MARKED = b'"%s":"%s"' % (WRITER.encode(), NAME.encode())
_LINE = re.compile(r'\{"crc32": "([0-9a-f]{8})", (.*)', re.DOTALL)
_BLOCK = 1 << 20  # bytes read at a time
_HEAD = 1 << 16  # bytes to search at least, because the length of the header may be damaged
_SETTLED = 2_000_000_000  # nanoseconds; after that, a change of a file changes its time stamp


def damaged(path: Path | str, found: str, advice: str = RESTORE) -> DamagedFileError:
    """Return the error for a damaged file; `found` says what is wrong with it."""
    return DamagedFileError(f"{path}: damaged ({found})", advice)


# --- safetensors -------------------------------------------------------------------------------


def write_checked_arrays(path: Path, arrays: Arrays, metadata: dict[str, str] | None = None) -> str:
    """Write a safetensors file that contains its own checksum; return the checksum.

    Raises:
        OSError: the file cannot be written.
    """
    entries = {**(metadata or {}), WRITER: NAME, DIGEST: _ZEROS.decode()}
    write_arrays(path, arrays, entries)
    with path.open("r+b") as stream:
        match = _STORED.search(_read_head(stream))
        assert match is not None
        digest = _digest_with_zeros(stream, match.start(1))
        stream.seek(match.start(1))
        stream.write(digest.encode())
    return digest


def read_checked_arrays(
    path: Path, *, expected: str | None = None
) -> tuple[Arrays, dict[str, str]]:
    """Read the arrays and the metadata of a safetensors file, after verifying its checksum.

    Args:
        expected: Checksum that the file must have; None if it may be any file.

    Raises:
        DamagedFileError: the file is damaged, or it is not the file with the checksum `expected`.
        FileNotFoundError: the file is missing.
        RuntimeError: the file is not a safetensors file.
    """
    verify_arrays(path, expected=expected)
    arrays, metadata = read_arrays(path)
    return arrays, {k: value for k, value in metadata.items() if k not in (DIGEST, WRITER)}


def verify_arrays(path: Path, *, expected: str | None = None) -> str | None:
    """Verify the checksum of a safetensors file and return it; None for another program's file.

    The result is remembered while the file's time stamp stays the same.

    Raises:
        DamagedFileError: the file is damaged, or it is not the file with the checksum `expected`.
        FileNotFoundError: the file is missing.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise damaged(path, "it is not a file")
        state = (str(path), status.st_ino, status.st_size, status.st_mtime_ns)
        is_settled = time.time_ns() - status.st_mtime_ns > _SETTLED
        digest = _remembered_digest(*state) if is_settled else _verified_digest(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise damaged(path, reason(error)) from error
    if expected is not None and digest != expected:
        raise damaged(path, "its checksum is not the one that the run recorded")
    return digest


@lru_cache(maxsize=64)
def _remembered_digest(path: str, inode: int, size: int, time_stamp: int) -> str | None:
    return _verified_digest(Path(path))


def _verified_digest(path: Path) -> str | None:
    with path.open("rb") as stream:
        head = _read_head(stream)
        match, is_marked = _STORED.search(head), _MARKED in head
        if match is None and not is_marked:
            _check_length(path, head, os.fstat(stream.fileno()).st_size)
            return None
        if match is None or not is_marked:
            raise damaged(path, MISSING if match is None else WRONG)
        digest = match[1].decode()
        if _digest_with_zeros(stream, match.start(1)) != digest:
            raise damaged(path, WRONG)
    return digest


def _check_length(path: Path, head: bytes, size: int) -> None:
    """Raise `DamagedFileError` if a safetensors file of another program has lost its end.

    MLX would notice only when the arrays are used.
    """
    length = 8 + int.from_bytes(head[:8], "little")
    try:
        entries = json.loads(head[8:length])
        end = max(e["data_offsets"][1] for name, e in entries.items() if name != "__metadata__")
        is_short = size < length + end
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return  # not a safetensors file; MLX says so
    if is_short:
        raise damaged(path, "the file is truncated")


def _read_head(stream: IO[bytes]) -> bytes:
    """Return the beginning of a safetensors file, with its whole header."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    length = 8 + int.from_bytes(stream.read(8), "little")
    stream.seek(0)
    return stream.read(max(length, _HEAD) if length <= size else _HEAD)


def _digest_with_zeros(stream: IO[bytes], position: int) -> str:
    """Return the SHA-256 (hex) of a file, with zeros for the 64 characters at `position`."""
    stream.seek(0)
    digest = sha256(stream.read(position) + _ZEROS)
    stream.seek(position + len(_ZEROS))
    while block := stream.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()


# --- JSON --------------------------------------------------------------------------------------


def to_checked_json(content: Mapping[str, Any]) -> str:
    """Return a JSON object as text, with its checksum as last entry."""
    entries = {**content, WRITER: NAME}
    return json.dumps({**entries, DIGEST: json_digest(entries)}, indent=2) + "\n"


def json_digest(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 (hex) of a JSON object, whatever the order of its keys and its spaces."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return sha256(text.encode()).hexdigest()


def check_json(content: dict[str, Any], path: Path | str) -> dict[str, Any]:
    """Return a JSON object without the entries of its checksum, after verifying the checksum.

    Raises:
        DamagedFileError: the content does not match the checksum.
    """
    entries = dict(content)
    stored = entries.pop(DIGEST, None)
    is_marked = entries.get(WRITER) == NAME
    if stored is None and not is_marked:
        return content
    if stored is None:
        raise damaged(path, MISSING, IF_EDITED)
    if stored != EDITED and stored != json_digest(entries):
        raise damaged(path, WRONG, IF_EDITED)
    entries.pop(WRITER, None)
    return entries


# --- lines of JSON -----------------------------------------------------------------------------


def to_checked_line(row: Mapping[str, Any]) -> str:
    """Return a JSON object as a line of text, with its checksum as first entry."""
    rest = json.dumps(row)[1:]
    return f'{{"crc32": "{zlib.crc32(rest.encode()):08x}", {rest}\n'


def check_line(line: str) -> str | None:
    """Return a line without its checksum, or None if the line is damaged.

    A line that never had a checksum is returned unchanged.
    """
    if (match := _LINE.fullmatch(line)) is None:
        return line if line.startswith('{"step"') else None
    matches = zlib.crc32(match[2].encode("utf-8", "replace")) == int(match[1], 16)
    return "{" + match[2] if matches else None


# --- any of them -------------------------------------------------------------------------------


def verify_file(path: Path, *, expected: str | None = None) -> str | None:
    """Verify the checksum in a safetensors or JSON file and return it; None if it has none.

    Raises:
        DamagedFileError: the file is missing, damaged, or not the one with the checksum `expected`.
    """
    if path.suffix == ".safetensors":
        try:
            if (digest := verify_arrays(path, expected=expected)) is None:
                read_arrays(path)  # lazy; checks the header
            return digest
        except FileNotFoundError:
            raise damaged(path, NOT_FOUND) from None
        except (RuntimeError, ValueError) as error:
            raise damaged(path, reason(error)) from error
    stored = read_checked_json(path)[1]
    if expected is not None and stored not in (expected, EDITED):
        raise damaged(path, "its checksum is not the one that the run recorded", IF_EDITED)
    return stored


def read_checked_json(path: Path) -> tuple[dict[str, Any], str | None]:
    """Return the JSON object in a file and its checksum, which is None if the file has none.

    Raises:
        DamagedFileError: the file is missing, is not a JSON object, or does not match its checksum.
    """
    if not os.path.lexists(path):
        raise damaged(path, NOT_FOUND)
    content = bounded.read_json(path, DamagedFileError)
    if not isinstance(content, dict):
        raise damaged(path, f"it contains {type(content).__name__} instead of a JSON object")
    return check_json(content, path), content.get(DIGEST)
