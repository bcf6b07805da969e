"""Datasets of tokenized pairs: memory-mapped files on disk, and selections of their pairs."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, overload

import numpy as np

from mlx_dpo.data.columns import (
    GAPS,
    LABELS,
    LENGTHS,
    MARGINS_AND_WEIGHTS,
    NO_LABEL,
    PART_DIGESTS,
    PROMPT_DIGESTS,
    RANKINGS,
    ColumnarPairs,
    prompt_keys,
    ranking_of,
    token_digest,
)
from mlx_dpo.data.files import RowLocations
from mlx_dpo.data.tokenization.pair_file import LOCATIONS, TOKENS, Arrays
from mlx_dpo.errors import ConfigError
from mlx_dpo.types import TokenizedPair


@dataclass(frozen=True, eq=False)
class MappedPairs:
    """The tokenized pairs of one data source, as memory-mapped arrays."""

    arrays: Arrays
    locations: RowLocations
    starts: Any  # (B + 1,) offsets of the pairs in the token ids

    @classmethod
    def from_arrays(cls, arrays: Arrays, locations: RowLocations) -> "MappedPairs":
        """Return the pairs in `arrays`, which `read_pair_file` returned."""
        bounds = 2 * arrays[GAPS][:, 0].astype(np.int64)  # of gaps; they follow the token ids
        ends = np.cumsum(arrays[LENGTHS].sum(axis=1, dtype=np.int64) + bounds)
        return cls(arrays, locations, np.concatenate([np.zeros(1, np.int64), ends]))

    def __len__(self) -> int:
        return len(self.arrays[LENGTHS])

    def pair(self, index: int) -> TokenizedPair:
        """Build the tokenized pair at `index`."""
        arrays = self.arrays
        prompt, chosen, rejected = arrays[LENGTHS][index].tolist()
        ids = tuple(arrays[TOKENS][self.starts[index] : self.starts[index + 1]].tolist())
        bounds = ids[prompt + chosen + rejected :]
        margin, weight = arrays[MARGINS_AND_WEIGHTS][index].tolist()
        label = int(arrays[LABELS][index])
        return TokenizedPair(
            ids[:prompt],
            ids[prompt : prompt + chosen],
            ids[prompt + chosen : prompt + chosen + rejected],
            self.locations.decode(arrays[LOCATIONS][index].tolist()),
            arrays[PROMPT_DIGESTS][index].tobytes().hex(),
            margin,
            weight,
            None if label == NO_LABEL else bool(label),
            ranking_of(arrays[RANKINGS][index]),
            tuple(zip(bounds[::2], bounds[1::2], strict=True)),
        )


class MismatchedCompletions(NamedTuple):
    """For each unpaired example (KTO), the completion of another prompt used as `rejected`."""

    indices: Any  # (B,) which pairs of the concatenated sources lend their `chosen` completion
    max_length: int  # maximum tokens of prompt + completion


class PairDataset(ColumnarPairs):
    """A selection of the pairs of one or more memory-mapped sources, in any order.

    A pair may be selected more than once. Pairs are built on access.
    """

    def __init__(
        self,
        sources: Sequence[MappedPairs],
        indices: Any = None,
        mismatched: MismatchedCompletions | None = None,
    ) -> None:
        """Select the pairs at `indices` (B,) of the concatenated sources; by default all pairs."""
        counts = [len(source) for source in sources]
        self._sources = tuple(sources)
        self._starts = np.cumsum([0, *counts])
        self._indices = np.arange(sum(counts)) if indices is None else np.asarray(indices, np.int64)
        self._mismatched = mismatched

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> TokenizedPair: ...
    @overload
    def __getitem__(self, index: slice) -> "PairDataset": ...
    def __getitem__(self, index: int | slice) -> "TokenizedPair | PairDataset":
        if isinstance(index, slice):
            return self._select(index)
        pair = self._build(self._indices[index])
        if self._mismatched is None:
            return pair
        completion = self._build(self._mismatched.indices[index]).chosen
        limit = max(1, self._mismatched.max_length - len(pair.prompt))
        return replace(pair, rejected=completion[:limit])

    def select(self, indices: Any) -> "PairDataset":
        """Return a dataset of the pairs at `indices`, an array of shape (b,)."""
        return self._select(np.asarray(indices, np.int64))

    def with_mismatched(self, others: Any, max_length: int) -> "PairDataset":
        """Return a dataset in which each example has the `chosen` of another example as `rejected`.

        Args:
            others: for each example, the index of that other example in this dataset. (B,)
            max_length: maximum tokens of prompt + completion; a longer completion is truncated.
        """
        indices = self._indices[np.asarray(others, np.int64)]
        return PairDataset(self._sources, self._indices, MismatchedCompletions(indices, max_length))

    def column(self, name: str) -> Any:
        """Return the column `name`, a key of `columns.COLUMNS`, as an array. (B, …)"""
        values = self._source_column(name)
        selected = values[self._indices]
        if self._mismatched is not None and name in (LENGTHS, PART_DIGESTS):
            selected[:, 2] = self._mismatched_column(name, values)
        return selected

    def _source_column(self, name: str) -> Any:
        return np.concatenate([source.arrays[name] for source in self._sources])

    def _mismatched_column(self, name: str, values: Any) -> Any:
        """Return the lengths or digests of the mismatched completions after truncation. (B,)

        `name` is the column of lengths or of digests, and `values` is that column of all sources.
        """
        assert self._mismatched is not None
        lengths = self._source_column(LENGTHS)
        limits = np.maximum(1, self._mismatched.max_length - lengths[self._indices, 0])
        completions = values[self._mismatched.indices, 1]
        if name == LENGTHS:
            return np.minimum(completions, limits)
        is_cut = lengths[self._mismatched.indices, 1] > limits
        for index in np.flatnonzero(is_cut).tolist():  # the digest on disk is of all tokens
            completions[index] = token_digest(self[index].rejected)
        return completions

    def _select(self, key: Any) -> "PairDataset":
        mismatched = self._mismatched
        if mismatched is not None:
            mismatched = mismatched._replace(indices=mismatched.indices[key])
        return PairDataset(self._sources, self._indices[key], mismatched)

    def _build(self, index: int) -> TokenizedPair:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._sources[number].pair(int(index - self._starts[number]))


def select_pairs(pairs: Sequence[TokenizedPair], indices: Sequence[int]) -> Sequence[TokenizedPair]:
    """Return the pairs at `indices`; pairs on disk are not read. (b,)"""
    if isinstance(pairs, PairDataset):
        return pairs.select(indices)
    return [pairs[i] for i in indices]


def concatenate(datasets: Sequence[PairDataset]) -> PairDataset:
    """Return one dataset with the pairs of all datasets; mismatched completions are left out."""
    sources = [source for dataset in datasets for source in dataset._sources]
    starts = np.cumsum([0] + [dataset._starts[-1] for dataset in datasets])
    indices = [
        dataset._indices + start for dataset, start in zip(datasets, starts[:-1], strict=True)
    ]
    return PairDataset(sources, np.concatenate(indices) if indices else None)


def with_mismatched_completions(
    examples: Sequence[TokenizedPair], max_length: int
) -> Sequence[TokenizedPair]:
    """Return the unpaired examples, each with the completion of another prompt as `rejected`.

    KTO estimates the KL divergence of policy and reference from these mismatched completions.
    They come from all examples, desirable and undesirable, and are truncated so that prompt +
    completion have at most `max_length` tokens.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1: outputs of the same data,
    shifted against the inputs.

    Raises:
        ConfigError: all examples have the same prompt.
    """
    others = _other_prompt_indices(prompt_keys(examples))
    if isinstance(examples, PairDataset):
        return examples.with_mismatched(others, max_length)
    return [
        replace(
            example,
            rejected=examples[other].chosen[: max(1, max_length - len(example.prompt))],
        )
        for example, other in zip(examples, others, strict=True)
    ]


def _other_prompt_indices(keys: Sequence[object]) -> list[int]:
    """Return, for each example, the index of an example with another prompt.

    Each index is used once, so that the share of desirable completions stays the same. Only if
    more than half of the examples have the same prompt, indices of other examples are used
    repeatedly.

    Args:
        keys: a key of the prompt of each example; equal prompts have equal keys.

    Raises:
        ConfigError: all examples have the same prompt.
    """
    groups: defaultdict[object, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        groups[key].append(index)
    if len(groups) == 1:
        raise ConfigError(
            "loss_type `kto` needs rows of at least two prompts in training and in held-out "
            "rows: it compares each prompt with the answer to another prompt; give more, or "
            "--valid-fraction 0"
        )
    grouped = [index for group in groups.values() for index in group]
    most = max(map(len, groups.values()), default=0)
    others = [0] * len(keys)
    if 2 * most <= len(keys):  # a shift by the size of the largest group leaves every group
        for position, index in enumerate(grouped):
            others[index] = grouped[position - most]
        return others
    largest = max(groups.values(), key=len)
    remaining = sorted(set(grouped) - set(largest))
    for group, completions in ((largest, remaining), (remaining, largest)):
        for position, index in enumerate(group):
            others[index] = completions[position % len(completions)]
    return others
