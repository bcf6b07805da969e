"""File format of tokenized pairs: token ids and columns, memory-mapped, with a checksum.

A file has the token ids of all pairs, each followed by the bounds of its gaps, then each column,
then JSON with the offsets of the columns and with metadata, then the length of that JSON (8 bytes,
little-endian), and at last a SHA-256 checksum of everything before.
"""

import json
import mmap
from collections.abc import Sequence
from hashlib import sha256
from typing import IO, Any

import numpy as np

from mlx_dpo.data.columns import COLUMNS, column
from mlx_dpo.data.files import RowLocations
from mlx_dpo.types import TokenizedPair

TOKENS, LOCATIONS = "tokens", "locations"
FILE_COLUMNS = {name: (spec.dtype, spec.shape) for name, spec in COLUMNS.items()}
FILE_COLUMNS |= {TOKENS: ("<i4", ()), LOCATIONS: ("<i8", (2,))}
ALIGNMENT = 8  # bytes
READ_BYTES = 1 << 20  # read at once
Arrays = dict[str, Any]


def pairs_to_arrays(pairs: Sequence[TokenizedPair], locations: RowLocations) -> Arrays:
    """Return token ids, columns and locations of the pairs as the arrays of a pair file."""
    ids = [
        i
        for pair in pairs
        for part in (pair.prompt, pair.chosen, pair.rejected, *pair.gaps)
        for i in part
    ]
    codes = [locations.encode(pair.location) for pair in pairs]
    arrays = {name: column(pairs, name) for name in COLUMNS}
    return arrays | {
        TOKENS: np.array(ids, "<i4"),
        LOCATIONS: np.array(codes, "<i8").reshape(-1, 2),
    }


class PairFileWriter:
    """Writer of a pair file, which adds pairs block by block and keeps no tokens in memory."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._checksum = stream, sha256()
        self._blocks: list[Arrays] = []
        self._bytes = self._tokens = 0

    def add(self, arrays: Arrays) -> None:
        """Append further pairs: write their token ids, and keep their columns for `finish`."""
        self._write(arrays[TOKENS].tobytes())
        self._tokens += len(arrays[TOKENS])
        self._blocks.append({name: array for name, array in arrays.items() if name != TOKENS})

    def finish(self, metadata: dict[str, Any]) -> None:
        """Write the columns, the metadata and the checksum, which completes the file."""
        index: dict[str, list[int]] = {TOKENS: [0, self._tokens]}
        for name in sorted(FILE_COLUMNS.keys() - {TOKENS}):
            dtype, shape = FILE_COLUMNS[name]
            parts = [block[name] for block in self._blocks]
            array = np.concatenate(parts) if parts else np.zeros((0, *shape), dtype)
            self._write(bytes(-self._bytes % ALIGNMENT))
            index[name] = [self._bytes, len(array)]
            self._write(array.tobytes())
        footer = json.dumps({"index": index, "metadata": metadata}).encode()
        self._write(footer)
        self._write(len(footer).to_bytes(8, "little"))
        self._stream.write(self._checksum.digest())
        self._stream.flush()

    def _write(self, data: bytes) -> None:
        self._stream.write(data)
        self._checksum.update(data)
        self._bytes += len(data)


def read_metadata(stream: IO[bytes]) -> dict[str, Any] | None:
    """Return a pair file's metadata; None if the checksum is wrong or for other formats."""
    footer = _read_footer(stream) if _has_valid_checksum(stream) else None
    return None if footer is None else footer["metadata"]


def read_pair_file(stream: IO[bytes]) -> tuple[Arrays, dict[str, Any]] | None:
    """Return memory-mapped arrays and metadata of a pair file.

    The result is None if the checksum is wrong or the file has another format.
    """
    if not _has_valid_checksum(stream) or (footer := _read_footer(stream)) is None:
        return None
    mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    arrays = {}
    for name, (offset, count) in footer["index"].items():
        dtype, shape = FILE_COLUMNS[name]
        flat = np.frombuffer(mapped, dtype, count * int(np.prod(shape, dtype=int)), offset)
        arrays[name] = flat.reshape(count, *shape)
    return arrays, footer["metadata"]


def _has_valid_checksum(stream: IO[bytes]) -> bool:
    width, checksum = sha256().digest_size, sha256()
    remaining = stream.seek(0, 2) - width
    stream.seek(0)
    while remaining > 0:
        data = stream.read(min(READ_BYTES, remaining))
        if not data:
            return False
        checksum.update(data)
        remaining -= len(data)
    return remaining == 0 and stream.read() == checksum.digest()


def _read_footer(stream: IO[bytes]) -> dict[str, Any] | None:
    tail = sha256().digest_size + 8
    size = stream.seek(0, 2)
    if size < tail:
        return None
    stream.seek(size - tail)
    length = int.from_bytes(stream.read(8), "little")
    if length > size - tail:
        return None
    stream.seek(size - tail - length)
    try:
        footer = json.loads(stream.read(length))
    except (ValueError, RecursionError):
        return None
    is_footer = isinstance(footer, dict) and footer.keys() == {"index", "metadata"}
    if not is_footer or not all(isinstance(part, dict) for part in footer.values()):
        return None
    return footer if footer["index"].keys() == FILE_COLUMNS.keys() else None
