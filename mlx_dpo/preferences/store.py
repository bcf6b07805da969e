"""Tokenized pairs in a file: written once, mapped into memory, made when they are asked for.

A file is the tokens of all pairs, the columns, what is said of them as JSON, its length, and
SHA-256 over all that. Knows no names of files and no tokenizer.
"""

import json
import mmap
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import IO, Any, NamedTuple

import numpy as np

from mlx_dpo.preferences.columns import COLUMNS, LABEL, LENGTHS, PROMPT, TOLD, UNJUDGED, column
from mlx_dpo.types import TokenizedPair

TOKENS, PLACES = "tokens", "places"
IN_FILE = {name: (spec.dtype, spec.shape) for name, spec in COLUMNS.items()}
IN_FILE |= {TOKENS: ("<i4", ()), PLACES: ("<i8", (4,))}  # two places: file and number of each
NOWHERE = -1
ALIGNED = 8
BLOCK = 1 << 20  # bytes that are read at once
Arrays = dict[str, Any]


class Places:
    """`file:12` and `file[12]` as numbers, and back, with the names of the files by number."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._number = {name: number for number, name in enumerate(names)}

    def coded(self, where: str) -> list[int]:
        """One place, or two of them (`a:1 and b:2`).

        Raises:
            ValueError: it is in none of the files.
        """
        if (found := self._coded(where)) is not None:
            return [*found, NOWHERE, NOWHERE]
        for both in re.finditer(" and ", where):  # which may be part of a name as well
            one, other = self._coded(where[: both.start()]), self._coded(where[both.end() :])
            if one is not None and other is not None:
                return [*one, *other]
        raise ValueError(f"`{where}` is in none of {self.names}")

    def _coded(self, where: str) -> tuple[int, int] | None:
        """The file, and the line; of an index, what is below 0."""
        indexed = where.endswith("]")
        name, _, number = where.removesuffix("]").rpartition("[" if indexed else ":")
        if name not in self._number or not number.isdecimal():
            return None
        return self._number[name], -1 - int(number) if indexed else int(number)

    def said(self, coded: Sequence[int]) -> str:
        """The place as it is written."""
        file, number, other, its = coded
        where = self._said(file, number)
        return where if other == NOWHERE else f"{where} and {self._said(other, its)}"

    def _said(self, file: int, number: int) -> str:
        name = self.names[file]
        return f"{name}:{number}" if number >= 0 else f"{name}[{-1 - number}]"


def arrays_of(pairs: Sequence[TokenizedPair], places: Places) -> Arrays:
    """Everything that a file holds of some pairs."""
    ids = [i for pair in pairs for part in (pair.prompt, pair.chosen, pair.rejected) for i in part]
    coded = [places.coded(pair.where) for pair in pairs]
    arrays = {name: column(pairs, name) for name in COLUMNS}
    return arrays | {TOKENS: np.array(ids, "<i4"), PLACES: np.array(coded, "<i8").reshape(-1, 4)}


class Writer:
    """Writes a file, block after block; of tokens none is held."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._sum = stream, sha256()
        self._blocks: list[Arrays] = []
        self._written = self._tokens = 0

    def add(self, arrays: Arrays) -> None:
        """The next pairs."""
        self._write(arrays[TOKENS].tobytes())
        self._tokens += len(arrays[TOKENS])
        self._blocks.append({name: array for name, array in arrays.items() if name != TOKENS})

    def finish(self, facts: dict[str, Any]) -> None:
        """The columns, and `facts`; afterwards the file can be read."""
        index: dict[str, list[int]] = {TOKENS: [0, self._tokens]}
        for name in sorted(IN_FILE.keys() - {TOKENS}):
            dtype, shape = IN_FILE[name]
            parts = [block[name] for block in self._blocks]
            array = np.concatenate(parts) if parts else np.zeros((0, *shape), dtype)
            self._write(bytes(-self._written % ALIGNED))
            index[name] = [self._written, len(array)]
            self._write(array.tobytes())
        said = json.dumps({"index": index, "facts": facts}).encode()
        self._write(said)
        self._write(len(said).to_bytes(8, "little"))
        self._stream.write(self._sum.digest())
        self._stream.flush()

    def _write(self, data: bytes) -> None:
        self._stream.write(data)
        self._sum.update(data)
        self._written += len(data)


def read_facts(stream: IO[bytes]) -> dict[str, Any] | None:
    """What `Writer.finish` was told, whole or not; None if it is none of these."""
    found = _footer(stream)
    return None if found is None else found["facts"]


def read_arrays(stream: IO[bytes]) -> tuple[Arrays, dict[str, Any]] | None:
    """The mapped columns and the facts of a file; None if it is damaged, or none of these."""
    if not _is_whole(stream) or (found := _footer(stream)) is None:
        return None
    mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    arrays = {}
    for name, (offset, count) in found["index"].items():
        dtype, shape = IN_FILE[name]
        flat = np.frombuffer(mapped, dtype, count * int(np.prod(shape, dtype=int)), offset)
        arrays[name] = flat.reshape(count, *shape)
    return arrays, found["facts"]


def _is_whole(stream: IO[bytes]) -> bool:
    width, hashed = sha256().digest_size, sha256()
    left = stream.seek(0, 2) - width
    stream.seek(0)
    while left > 0:
        data = stream.read(min(BLOCK, left))
        if not data:
            return False
        hashed.update(data)
        left -= len(data)
    return left == 0 and stream.read() == hashed.digest()


def _footer(stream: IO[bytes]) -> dict[str, Any] | None:
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
        found = json.loads(stream.read(length))
    except ValueError:
        return None
    wanted = isinstance(found, dict) and found.keys() == {"index", "facts"}
    return found if wanted and found["index"].keys() == IN_FILE.keys() else None


@dataclass(frozen=True, eq=False)
class Store:
    """The pairs of one source, on disk."""

    arrays: Arrays
    places: Places
    starts: Any  # (B + 1,) where the tokens of each begin

    @classmethod
    def of(cls, arrays: Arrays, places: Places) -> "Store":
        """What `read_arrays` gave, with the names of the files."""
        ends = np.cumsum(arrays[LENGTHS].sum(axis=1, dtype=np.int64))
        return cls(arrays, places, np.concatenate([np.zeros(1, np.int64), ends]))

    def __len__(self) -> int:
        return len(self.arrays[LENGTHS])

    def pair(self, at: int) -> TokenizedPair:
        """One pair, made now."""
        arrays = self.arrays
        prompt, chosen, _ = arrays[LENGTHS][at].tolist()
        ids = tuple(arrays[TOKENS][self.starts[at] : self.starts[at + 1]].tolist())
        margin, weight = arrays[TOLD][at].tolist()
        label = int(arrays[LABEL][at])
        return TokenizedPair(
            ids[:prompt],
            ids[prompt : prompt + chosen],
            ids[prompt + chosen :],
            self.places.said(arrays[PLACES][at].tolist()),
            arrays[PROMPT][at].tobytes().hex(),
            margin,
            weight,
            None if label == UNJUDGED else bool(label),
        )


class Against(NamedTuple):
    """Whose chosen completions stand in place of the rejected ones, and how long rows may be."""

    at: Any  # (B,) places in the stores
    max_length: int
