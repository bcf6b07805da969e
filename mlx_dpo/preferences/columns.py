"""What is known of many pairs at once, as arrays: lengths, digests, what the data says of them.

Of a list it is gathered. A `Table` has it, and makes a pair only when it is asked for: whatever
looks at all pairs of a run looks at columns.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from hashlib import blake2b, sha256
from typing import Any, NamedTuple

import numpy as np

from mlx_dpo.types import TokenizedPair

UNJUDGED = -1  # in place of a label
DIGEST, ASKED = 16, 32  # bytes of the digest of a part, and of a prompt


class Column(NamedTuple):
    """One value, or one row of them, for each pair."""

    dtype: str
    shape: tuple[int, ...]  # of a pair's
    of: Callable[[TokenizedPair], Any]


def part_digest(ids: Sequence[int]) -> bytes:
    """What tells a prompt or a completion from all others, by its tokens."""
    return blake2b(np.array(ids, "<i4").tobytes(), digest_size=DIGEST).digest()


def _parts(pair: TokenizedPair) -> tuple[tuple[int, ...], ...]:
    return pair.prompt, pair.chosen, pair.rejected


LENGTHS, PARTS, PROMPT, TOLD, LABEL = "lengths", "parts", "prompt", "told", "label"
COLUMNS = {
    LENGTHS: Column("<i4", (3,), lambda pair: [len(ids) for ids in _parts(pair)]),
    PARTS: Column(f"V{DIGEST}", (3,), lambda pair: [part_digest(ids) for ids in _parts(pair)]),
    PROMPT: Column(f"V{ASKED}", (), lambda pair: bytes.fromhex(pair.asked)),
    TOLD: Column("<f8", (2,), lambda pair: (pair.margin, pair.weight)),
    LABEL: Column("i1", (), lambda p: UNJUDGED if p.desirable is None else int(p.desirable)),
}


class Table(Sequence[TokenizedPair]):
    """Pairs whose columns are there without them."""

    @abstractmethod
    def column(self, name: str) -> Any:
        """One of `COLUMNS`. (B, …)"""


def column(pairs: Sequence[TokenizedPair], name: str) -> Any:
    """One of `COLUMNS` of any pairs. (B, …)"""
    if isinstance(pairs, Table):
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


def prompts(pairs: Sequence[TokenizedPair]) -> list[object]:
    """What tells each pair's prompt from others, as it was before anything was cut."""
    if isinstance(pairs, Table):
        return list(pairs.column(PROMPT).tolist())
    return [pair.asked or pair.prompt for pair in pairs]  # made by hand, it knows only tokens


def digest(pairs: Sequence[TokenizedPair]) -> str:
    """SHA-256 over the pairs in order, as hex; the places they came from do not matter.

    Over digests of the token ids, and over margins, weights and judgements. All of one width,
    so that no two sets of pairs read the same.
    """
    hashed = sha256()
    for name in (PARTS, TOLD, LABEL):
        hashed.update(column(pairs, name).tobytes())
    return hashed.hexdigest()


def shared(ours: Sequence[TokenizedPair], theirs: Sequence[TokenizedPair]) -> int:
    """How many different pairs, by tokens, are in both.

    What a judged answer is held against belongs to another row, and does not count.
    """
    return len(_contents(ours) & _contents(theirs))


def _contents(pairs: Sequence[TokenizedPair]) -> set[bytes]:
    parts = np.array(column(pairs, PARTS))
    parts[column(pairs, LABEL) != UNJUDGED, 2] = bytes(DIGEST)
    width = 3 * DIGEST
    whole = parts.tobytes()
    return {whole[start : start + width] for start in range(0, len(whole), width)}


class Sketch(NamedTuple):
    """A pair of which only lengths are known: all that the cost of a pass is a function of."""

    prompt: range
    chosen: range
    rejected: range
    row: int

    def __len__(self) -> int:
        """Tokens of the longer of the two rows."""
        return self.row


class Sketches(Sequence[Any]):
    """Pairs by their lengths, made when asked for."""

    def __init__(self, lengths: Any) -> None:
        self._lengths = lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return Sketches(self._lengths[at])
        prompt, chosen, rejected = self._lengths[at].tolist()
        row = prompt + max(chosen, rejected)
        return Sketch(range(prompt), range(chosen), range(rejected), row)


def sketches(pairs: Sequence[TokenizedPair]) -> Sequence[Any]:
    """Something that has the lengths of the pairs, whose tokens are left where they are."""
    return Sketches(pairs.column(LENGTHS)) if isinstance(pairs, Table) else pairs
