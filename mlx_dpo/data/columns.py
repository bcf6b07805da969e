"""Columns of tokenized pairs: lengths, digests, margins, weights, labels and lists as arrays.

Code that looks at all pairs of a run reads columns, because building every pair would be slow. For
a list of pairs the columns are computed; a `ColumnarPairs` stores its columns.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from hashlib import blake2b, sha256
from typing import Any, NamedTuple

import numpy as np

from mlx_dpo.types import NO_LIST, RankedPair, TokenizedPair

NO_LABEL = -1  # value of the label column for preference pairs
PART_DIGEST_BYTES, PROMPT_DIGEST_BYTES = 16, 32


class ColumnSpec(NamedTuple):
    """Declaration of a column: data type, shape of a pair's value, function that computes it."""

    dtype: str
    shape: tuple[int, ...]  # of the value of one pair
    get_value: Callable[[TokenizedPair], Any]


def token_digest(ids: Sequence[int]) -> bytes:
    """Return a digest of the token ids of a prompt or a completion."""
    return blake2b(np.array(ids, "<i4").tobytes(), digest_size=PART_DIGEST_BYTES).digest()


def _get_lengths(pair: TokenizedPair) -> list[int]:
    return [len(ids) for ids in (pair.prompt, pair.chosen, pair.rejected)]


def _get_part_digests(pair: TokenizedPair) -> list[bytes]:
    # No token id is negative: the digest of a completion with gaps is that of no other one.
    marks = [bound for gap in pair.gaps for bound in (-1, *gap)]
    return [token_digest(ids) for ids in (pair.prompt, (*pair.chosen, *marks), pair.rejected)]


def _get_label(pair: TokenizedPair) -> int:
    return NO_LABEL if pair.desirable is None else int(pair.desirable)


LENGTHS = "lengths"  # tokens of prompt, chosen and rejected
GAPS = "gaps"  # number of gaps in chosen, and tokens in them
PART_DIGESTS = "part_digests"  # of prompt, chosen and rejected, as token ids
PROMPT_DIGESTS = "prompt_digests"  # of the prompt as text, before truncation
MARGINS_AND_WEIGHTS = "margins_and_weights"
LABELS = "labels"  # 1 desirable, 0 undesirable, NO_LABEL for preference pairs
RANKINGS = "rankings"  # `RankedPair` as numbers
COLUMNS = {
    LENGTHS: ColumnSpec("<i4", (3,), _get_lengths),
    GAPS: ColumnSpec(
        "<i4", (2,), lambda pair: (len(pair.gaps), len(pair.chosen) - pair.num_scored)
    ),
    PART_DIGESTS: ColumnSpec(f"V{PART_DIGEST_BYTES}", (3,), _get_part_digests),
    PROMPT_DIGESTS: ColumnSpec(
        f"V{PROMPT_DIGEST_BYTES}", (), lambda pair: bytes.fromhex(pair.prompt_digest)
    ),
    MARGINS_AND_WEIGHTS: ColumnSpec("<f8", (2,), lambda pair: (pair.margin, pair.weight)),
    LABELS: ColumnSpec("i1", (), _get_label),
    RANKINGS: ColumnSpec("<f8", (len(NO_LIST),), lambda pair: pair.ranking),
}


def ranking_of(values: Any) -> RankedPair:
    """Return the value of the column of rankings, (7,), as a `RankedPair`."""
    list_id, chosen, rejected, best, worst, score_range, num_pairs = values.tolist()
    if not num_pairs:
        return NO_LIST
    place = int(list_id), int(chosen), int(rejected)
    return RankedPair(*place, best, worst, score_range, int(num_pairs))


class ColumnarPairs(Sequence[TokenizedPair]):
    """A sequence of tokenized pairs whose columns can be read without building the pairs."""

    @abstractmethod
    def column(self, name: str) -> Any:
        """Return the column `name`, a key of `COLUMNS`, as an array. (B, …)"""


def column(pairs: Sequence[TokenizedPair], name: str) -> Any:
    """Return the pairs' column `name`, a key of `COLUMNS`, as an array. (B, …)"""
    if isinstance(pairs, ColumnarPairs):
        return pairs.column(name)
    dtype, shape, get_value = COLUMNS[name]
    return np.array([get_value(pair) for pair in pairs], dtype).reshape(len(pairs), *shape)


def row_lengths(pairs: Sequence[TokenizedPair]) -> Any:
    """Return each pair's number of tokens in prompt + longer completion. (B,)"""
    lengths = column(pairs, LENGTHS)
    return lengths[:, 0] + lengths[:, 1:].max(axis=1)


def longest_row(*splits: Sequence[TokenizedPair]) -> int:
    """Return the largest number of tokens of prompt + completion in all pairs of all splits.

    The result is 0 if there are no pairs.
    """
    return max((int(row_lengths(pairs).max()) for pairs in splits if len(pairs)), default=0)


def longest_pairs(count: int, *splits: Sequence[TokenizedPair]) -> list[TokenizedPair]:
    """Return the `count` longest pairs of all splits, the longest last.

    The length of a pair is the number of tokens of its prompt and longer completion. Pairs of
    equal length keep their order.
    """
    lengths = np.concatenate([row_lengths(pairs) for pairs in splits])
    ends = np.cumsum([len(pairs) for pairs in splits])
    longest = []
    for index in np.argsort(lengths, kind="stable")[-count:].tolist():
        split = int(np.searchsorted(ends, index, side="right"))
        longest.append(splits[split][index - int(ends[split])])  # a negative index of the split
    return longest


def prompt_keys(pairs: Sequence[TokenizedPair]) -> list[object]:
    """Return one key per pair, made from its untruncated prompt; equal prompts have equal keys."""
    if isinstance(pairs, ColumnarPairs):
        return list(pairs.column(PROMPT_DIGESTS).tolist())
    return [pair.prompt_digest or pair.prompt for pair in pairs]  # tests build pairs from tokens


def pairs_digest(pairs: Sequence[TokenizedPair], *, rankings: bool = False) -> str:
    """Return a SHA-256 digest of the pairs in their order, as hex; locations are not part of it.

    The digest covers the digests of the token ids, the margins, weights and labels, and with
    `rankings` also lists and scores. Each of these has a fixed width, so that different pairs never
    produce the same bytes.
    """
    hashed = sha256()
    for name in (PART_DIGESTS, MARGINS_AND_WEIGHTS, LABELS, *[RANKINGS] * rankings):
        hashed.update(column(pairs, name).tobytes())
    return hashed.hexdigest()


def count_shared_pairs(first: Sequence[TokenizedPair], second: Sequence[TokenizedPair]) -> int:
    """Return how many distinct pairs occur in both `first` and `second`, by their token ids."""
    return len(set(pair_keys(first)) & set(pair_keys(second)))


def pair_keys(pairs: Sequence[TokenizedPair]) -> list[bytes]:
    """Return one key per pair, made from its token ids; equal pairs have equal keys.

    The mismatched completion of an unpaired example (KTO) is left out: it comes from another
    example.
    """
    parts = np.array(column(pairs, PART_DIGESTS))
    parts[column(pairs, LABELS) != NO_LABEL, 2] = bytes(PART_DIGEST_BYTES)
    width = 3 * PART_DIGEST_BYTES
    data = parts.tobytes()
    return [data[start : start + width] for start in range(0, len(data), width)]


class PairLengths(NamedTuple):
    """Stand-in for a tokenized pair that has only the lengths of prompt and completions.

    Each part is a `range` of the right length. This is enough to count the tokens of a batch.
    """

    prompt: range
    chosen: range
    rejected: range
    row: int  # tokens of the prompt and the longer completion

    def __len__(self) -> int:
        """Return the number of tokens of the prompt and the longer completion."""
        return self.row


class PairLengthsView(Sequence[Any]):
    """A sequence of `PairLengths`, each built from an array of lengths when it is accessed."""

    def __init__(self, lengths: Any) -> None:
        self._lengths = lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return PairLengthsView(self._lengths[index])
        prompt, chosen, rejected = self._lengths[index].tolist()
        row = prompt + max(chosen, rejected)
        return PairLengths(range(prompt), range(chosen), range(rejected), row)


def lengths_only(pairs: Sequence[TokenizedPair]) -> Sequence[Any]:
    """Return stand-ins for pairs on disk that know only their lengths, so no tokens are read.

    Pairs in memory are returned unchanged.
    """
    return PairLengthsView(pairs.column(LENGTHS)) if isinstance(pairs, ColumnarPairs) else pairs
