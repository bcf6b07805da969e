"""What is known of many pairs at once, as arrays: lengths, digests, what the data says of them.

Of a list it is gathered. A `Table` has it, and makes a pair only when it is asked for: whatever
looks at all pairs of a run looks at columns.
"""

import json
import mmap
import re
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b, sha256
from typing import IO, Any, NamedTuple, overload

import numpy as np

from mlx_dpo.errors import ConfigError
from mlx_dpo.types import TokenizedPair

NO_LABEL = -1  # in place of a label
PART_DIGEST_BYTES, PROMPT_DIGEST_BYTES = 16, 32  # bytes of the digest of a part, and of a prompt


class ColumnSpec(NamedTuple):
    """One value, or one row of them, for each pair."""

    dtype: str
    shape: tuple[int, ...]  # of a pair's
    of: Callable[[TokenizedPair], Any]


def token_digest(ids: Sequence[int]) -> bytes:
    """What tells a prompt or a completion from all others, by its tokens."""
    return blake2b(np.array(ids, "<i4").tobytes(), digest_size=PART_DIGEST_BYTES).digest()


def _parts(pair: TokenizedPair) -> tuple[tuple[int, ...], ...]:
    return pair.prompt, pair.chosen, pair.rejected


LENGTHS, PART_DIGESTS, PROMPT_DIGESTS, MARGINS_AND_WEIGHTS, LABELS = (
    "lengths",
    "parts",
    "prompt",
    "told",
    "label",
)
COLUMNS = {
    LENGTHS: ColumnSpec("<i4", (3,), lambda pair: [len(ids) for ids in _parts(pair)]),
    PART_DIGESTS: ColumnSpec(
        f"V{PART_DIGEST_BYTES}", (3,), lambda pair: [token_digest(ids) for ids in _parts(pair)]
    ),
    PROMPT_DIGESTS: ColumnSpec(
        f"V{PROMPT_DIGEST_BYTES}", (), lambda pair: bytes.fromhex(pair.prompt_digest)
    ),
    MARGINS_AND_WEIGHTS: ColumnSpec("<f8", (2,), lambda pair: (pair.margin, pair.weight)),
    LABELS: ColumnSpec("i1", (), lambda p: NO_LABEL if p.desirable is None else int(p.desirable)),
}


class ColumnarPairs(Sequence[TokenizedPair]):
    """Pairs whose columns are there without them."""

    @abstractmethod
    def column(self, name: str) -> Any:
        """One of `COLUMNS`. (B, …)"""


def column(pairs: Sequence[TokenizedPair], name: str) -> Any:
    """One of `COLUMNS` of any pairs. (B, …)"""
    if isinstance(pairs, ColumnarPairs):
        return pairs.column(name)
    dtype, shape, of = COLUMNS[name]
    return np.array([of(pair) for pair in pairs], dtype).reshape(len(pairs), *shape)


def row_lengths(pairs: Sequence[TokenizedPair]) -> Any:
    """Tokens of the longer row of each pair. (B,)"""
    lengths = column(pairs, LENGTHS)
    return lengths[:, 0] + lengths[:, 1:].max(axis=1)


def longest_row(*splits: Sequence[TokenizedPair]) -> int:
    """Tokens of the longest row of all; 0 if there is none."""
    return max((int(row_lengths(pairs).max()) for pairs in splits if len(pairs)), default=0)


def longest_pairs(count: int, *splits: Sequence[TokenizedPair]) -> list[TokenizedPair]:
    """So many of all pairs with the longest rows, the longest last; ties keep their order."""
    lengths = np.concatenate([row_lengths(pairs) for pairs in splits])
    ends = np.cumsum([len(pairs) for pairs in splits])
    found = []
    for at in np.argsort(lengths, kind="stable")[-count:].tolist():
        split = int(np.searchsorted(ends, at, side="right"))
        found.append(splits[split][at - int(ends[split])])  # counted from its end
    return found


def prompt_keys(pairs: Sequence[TokenizedPair]) -> list[object]:
    """What tells each pair's prompt from others, as it was before anything was cut."""
    if isinstance(pairs, ColumnarPairs):
        return list(pairs.column(PROMPT_DIGESTS).tolist())
    return [
        pair.prompt_digest or pair.prompt for pair in pairs
    ]  # made by hand, it knows only tokens


def pairs_digest(pairs: Sequence[TokenizedPair]) -> str:
    """SHA-256 over the pairs in order, as hex; the places they came from do not matter.

    Over digests of the token ids, and over margins, weights and judgements. All of one width,
    so that no two sets of pairs read the same.
    """
    hashed = sha256()
    for name in (PART_DIGESTS, MARGINS_AND_WEIGHTS, LABELS):
        hashed.update(column(pairs, name).tobytes())
    return hashed.hexdigest()


def count_shared_pairs(ours: Sequence[TokenizedPair], theirs: Sequence[TokenizedPair]) -> int:
    """How many different pairs, by tokens, are in both.

    What a judged answer is held against belongs to another row, and does not count.
    """
    return len(_contents(ours) & _contents(theirs))


def _contents(pairs: Sequence[TokenizedPair]) -> set[bytes]:
    parts = np.array(column(pairs, PART_DIGESTS))
    parts[column(pairs, LABELS) != NO_LABEL, 2] = bytes(PART_DIGEST_BYTES)
    width = 3 * PART_DIGEST_BYTES
    whole = parts.tobytes()
    return {whole[start : start + width] for start in range(0, len(whole), width)}


class PairLengths(NamedTuple):
    """A pair of which only lengths are known: all that the cost of a pass is a function of."""

    prompt: range
    chosen: range
    rejected: range
    row: int

    def __len__(self) -> int:
        """Tokens of the longer of the two rows."""
        return self.row


class PairLengthsView(Sequence[Any]):
    """Pairs by their lengths, made when asked for."""

    def __init__(self, lengths: Any) -> None:
        self._lengths = lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return PairLengthsView(self._lengths[at])
        prompt, chosen, rejected = self._lengths[at].tolist()
        row = prompt + max(chosen, rejected)
        return PairLengths(range(prompt), range(chosen), range(rejected), row)


def lengths_only(pairs: Sequence[TokenizedPair]) -> Sequence[Any]:
    """Something that has the lengths of the pairs, whose tokens are left where they are."""
    return PairLengthsView(pairs.column(LENGTHS)) if isinstance(pairs, ColumnarPairs) else pairs


TOKENS, LOCATIONS = "tokens", "places"
FILE_COLUMNS = {name: (spec.dtype, spec.shape) for name, spec in COLUMNS.items()}
FILE_COLUMNS |= {
    TOKENS: ("<i4", ()),
    LOCATIONS: ("<i8", (4,)),
}  # two places: file and number of each
NOWHERE = -1
ALIGNMENT = 8
READ_BYTES = 1 << 20  # bytes that are read at once
Arrays = dict[str, Any]


class RowLocations:
    """`file:12` and `file[12]` as numbers, and back, with the names of the files by number."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._number = {name: number for number, name in enumerate(names)}

    def coded(self, location: str) -> list[int]:
        """One place, or two of them (`a:1 and b:2`).

        Raises:
            ValueError: it is in none of the files.
        """
        if (found := self._coded(location)) is not None:
            return [*found, NOWHERE, NOWHERE]
        for both in re.finditer(" and ", location):  # which may be part of a name as well
            one, other = self._coded(location[: both.start()]), self._coded(location[both.end() :])
            if one is not None and other is not None:
                return [*one, *other]
        raise ValueError(f"`{location}` is in none of {self.names}")

    def _coded(self, location: str) -> tuple[int, int] | None:
        """The file, and the line; of an index, what is below 0."""
        indexed = location.endswith("]")
        name, _, number = location.removesuffix("]").rpartition("[" if indexed else ":")
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


def pairs_to_arrays(pairs: Sequence[TokenizedPair], places: RowLocations) -> Arrays:
    """Everything that a file holds of some pairs."""
    ids = [i for pair in pairs for part in (pair.prompt, pair.chosen, pair.rejected) for i in part]
    coded = [places.coded(pair.location) for pair in pairs]
    arrays = {name: column(pairs, name) for name in COLUMNS}
    return arrays | {TOKENS: np.array(ids, "<i4"), LOCATIONS: np.array(coded, "<i8").reshape(-1, 4)}


class PairFileWriter:
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
        for name in sorted(FILE_COLUMNS.keys() - {TOKENS}):
            dtype, shape = FILE_COLUMNS[name]
            parts = [block[name] for block in self._blocks]
            array = np.concatenate(parts) if parts else np.zeros((0, *shape), dtype)
            self._write(bytes(-self._written % ALIGNMENT))
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


def read_metadata(stream: IO[bytes]) -> dict[str, Any] | None:
    """What `Writer.finish` was told, whole or not; None if it is none of these."""
    found = _footer(stream)
    return None if found is None else found["facts"]


def read_pair_file(stream: IO[bytes]) -> tuple[Arrays, dict[str, Any]] | None:
    """The mapped columns and the facts of a file; None if it is damaged, or none of these."""
    if not _has_valid_checksum(stream) or (found := _footer(stream)) is None:
        return None
    mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    arrays = {}
    for name, (offset, count) in found["index"].items():
        dtype, shape = FILE_COLUMNS[name]
        flat = np.frombuffer(mapped, dtype, count * int(np.prod(shape, dtype=int)), offset)
        arrays[name] = flat.reshape(count, *shape)
    return arrays, found["facts"]


def _has_valid_checksum(stream: IO[bytes]) -> bool:
    width, hashed = sha256().digest_size, sha256()
    left = stream.seek(0, 2) - width
    stream.seek(0)
    while left > 0:
        data = stream.read(min(READ_BYTES, left))
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
    return found if wanted and found["index"].keys() == FILE_COLUMNS.keys() else None


@dataclass(frozen=True, eq=False)
class MappedPairs:
    """The pairs of one source, on disk."""

    arrays: Arrays
    places: RowLocations
    starts: Any  # (B + 1,) where the tokens of each begin

    @classmethod
    def of(cls, arrays: Arrays, places: RowLocations) -> "MappedPairs":
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
        margin, weight = arrays[MARGINS_AND_WEIGHTS][at].tolist()
        label = int(arrays[LABELS][at])
        return TokenizedPair(
            ids[:prompt],
            ids[prompt : prompt + chosen],
            ids[prompt + chosen :],
            self.places.said(arrays[LOCATIONS][at].tolist()),
            arrays[PROMPT_DIGESTS][at].tobytes().hex(),
            margin,
            weight,
            None if label == NO_LABEL else bool(label),
        )


class MismatchedCompletions(NamedTuple):
    """Whose chosen completions stand in place of the rejected ones, and how long rows may be."""

    at: Any  # (B,) places in the stores
    max_length: int


class PairDataset(ColumnarPairs):
    """Places in one store or several behind one another; a pair may stand there twice."""

    def __init__(
        self,
        stores: Sequence[MappedPairs],
        at: Any = None,
        against: MismatchedCompletions | None = None,
    ) -> None:
        """All pairs of the stores, or those `at` these places (B,)."""
        counts = [len(store) for store in stores]
        self._stores = tuple(stores)
        self._begins = np.cumsum([0, *counts])
        self._at = np.arange(sum(counts)) if at is None else np.asarray(at, np.int64)
        self._against = against

    def __len__(self) -> int:
        return len(self._at)

    @overload
    def __getitem__(self, at: int) -> TokenizedPair: ...
    @overload
    def __getitem__(self, at: slice) -> "PairDataset": ...
    def __getitem__(self, at: int | slice) -> "TokenizedPair | PairDataset":
        if isinstance(at, slice):
            return self._some(at)
        pair = self._made(self._at[at])
        if self._against is None:
            return pair
        other = self._made(self._against.at[at])
        return replace(pair, rejected=other.chosen[: self._room(len(pair.prompt))])

    def select(self, at: Any) -> "PairDataset":
        """The pairs at these places of this sequence. (b,)"""
        return self._some(np.asarray(at, np.int64))

    def with_mismatched(self, others: Any, max_length: int) -> "PairDataset":
        """Judged answers, each with the answer at another place (B,) as `rejected`, cut to fit."""
        at = self._at[np.asarray(others, np.int64)]
        return PairDataset(self._stores, self._at, MismatchedCompletions(at, max_length))

    def column(self, name: str) -> Any:
        """One of `columns.COLUMNS`. (B, …)"""
        every = np.concatenate([store.arrays[name] for store in self._stores])
        found = every[self._at]
        if self._against is not None and name in (LENGTHS, PART_DIGESTS):
            found[:, 2] = self._others(name, every)
        return found

    def _others(self, name: str, every: Any) -> Any:
        """What the mismatched completions have in a column. (B,)"""
        assert self._against is not None
        others = every[self._against.at, 1]
        if name == LENGTHS:
            return np.minimum(others, self._rooms())
        for i in np.flatnonzero(self._cut()).tolist():  # only of these the digest is not known
            others[i] = token_digest(self[i].rejected)
        return others

    def _rooms(self) -> Any:
        assert self._against is not None
        prompts = np.concatenate([store.arrays[LENGTHS][:, 0] for store in self._stores])[self._at]
        return np.maximum(1, self._against.max_length - prompts)

    def _cut(self) -> Any:
        assert self._against is not None
        chosen = np.concatenate([store.arrays[LENGTHS][:, 1] for store in self._stores])
        return chosen[self._against.at] > self._rooms()

    def _room(self, prompt: int) -> int:
        assert self._against is not None
        return max(1, self._against.max_length - prompt)

    def _some(self, at: Any) -> "PairDataset":
        against = self._against and self._against._replace(at=self._against.at[at])
        return PairDataset(self._stores, self._at[at], against)

    def _made(self, at: int) -> TokenizedPair:
        number = int(np.searchsorted(self._begins, at, side="right")) - 1
        return self._stores[number].pair(int(at - self._begins[number]))


def concatenate(parts: Sequence[PairDataset]) -> PairDataset:
    """The pairs of all parts, one behind the other."""
    stores = [store for part in parts for store in part._stores]
    ends = np.cumsum([0] + [part._begins[-1] for part in parts])
    at = [part._at + begin for part, begin in zip(parts, ends[:-1], strict=True)]
    return PairDataset(stores, np.concatenate(at) if at else None)


def with_mismatched_completions(
    rows: Sequence[TokenizedPair], max_length: int
) -> Sequence[TokenizedPair]:
    """Each judged answer with an answer to another prompt as `rejected`, cut to `max_length`.

    The answers are all those of the rows, turned against their prompts: KTO estimates by them
    how far the policy has moved from the reference, which the bad ones alone would not tell.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1: outputs of the same data,
    shifted against the inputs.

    Raises:
        ConfigError: all rows have the same prompt.
    """
    others = _other_prompt_indices(prompt_keys(rows))
    if isinstance(rows, PairDataset):
        return rows.with_mismatched(others, max_length)
    return [
        replace(row, rejected=rows[other].chosen[: max(1, max_length - len(row.prompt))])
        for row, other in zip(rows, others, strict=True)
    ]


def _other_prompt_indices(asked: Sequence[object]) -> list[int]:
    """For each row the place of one that was asked something else.

    Every answer is taken once: good and bad ones as often as there are. Only where more than
    half of the rows have one prompt are those of the others taken again.
    """
    places: defaultdict[object, list[int]] = defaultdict(list)
    for place, prompt in enumerate(asked):
        places[prompt].append(place)
    if len(places) == 1:
        raise ConfigError(
            "loss_type `kto` needs rows of at least two prompts in training and in held-out "
            "rows: it compares each with the answer to another one; give more, or "
            "--valid-fraction 0"
        )
    together = [place for group in places.values() for place in group]
    most = max(map(len, places.values()), default=0)
    others = [0] * len(asked)
    if 2 * most <= len(asked):  # the largest group, moved by its size, leaves itself behind
        for at, place in enumerate(together):
            others[place] = together[at - most]
        return others
    largest = max(places.values(), key=len)
    elsewhere = sorted(set(together) - set(largest))
    for group, answers in ((largest, elsewhere), (elsewhere, largest)):
        for at, place in enumerate(group):
            others[place] = answers[at % len(answers)]
    return others
