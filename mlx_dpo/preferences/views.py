"""Pairs of stores in any order, as a sequence: no pair is made before it is asked for."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, overload

import numpy as np

from mlx_dpo.preferences.columns import LENGTHS, PARTS, Table, part_digest
from mlx_dpo.preferences.store import Against, Store
from mlx_dpo.types import TokenizedPair


class StoredPairs(Table):
    """Places in one store or several behind one another; a pair may stand there twice."""

    def __init__(
        self, stores: Sequence[Store], at: Any = None, against: Against | None = None
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
    def __getitem__(self, at: slice) -> "StoredPairs": ...
    def __getitem__(self, at: int | slice) -> "TokenizedPair | StoredPairs":
        if isinstance(at, slice):
            return self._some(at)
        pair = self._made(self._at[at])
        if self._against is None:
            return pair
        other = self._made(self._against.at[at])
        return replace(pair, rejected=other.chosen[: self._room(len(pair.prompt))])

    def picked(self, at: Any) -> "StoredPairs":
        """The pairs at these places of this sequence. (b,)"""
        return self._some(np.asarray(at, np.int64))

    def against(self, others: Any, max_length: int) -> "StoredPairs":
        """Judged answers, each with the answer at another place (B,) as `rejected`, cut to fit."""
        at = self._at[np.asarray(others, np.int64)]
        return StoredPairs(self._stores, self._at, Against(at, max_length))

    def column(self, name: str) -> Any:
        """One of `columns.COLUMNS`. (B, …)"""
        every = np.concatenate([store.arrays[name] for store in self._stores])
        found = every[self._at]
        if self._against is not None and name in (LENGTHS, PARTS):
            found[:, 2] = self._others(name, every)
        return found

    def _others(self, name: str, every: Any) -> Any:
        """What the mismatched completions have in a column. (B,)"""
        assert self._against is not None
        others = every[self._against.at, 1]
        if name == LENGTHS:
            return np.minimum(others, self._rooms())
        for i in np.flatnonzero(self._cut()).tolist():  # only of these the digest is not known
            others[i] = part_digest(self[i].rejected)
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

    def _some(self, at: Any) -> "StoredPairs":
        against = self._against and self._against._replace(at=self._against.at[at])
        return StoredPairs(self._stores, self._at[at], against)

    def _made(self, at: int) -> TokenizedPair:
        number = int(np.searchsorted(self._begins, at, side="right")) - 1
        return self._stores[number].pair(int(at - self._begins[number]))


def joined(parts: Sequence[StoredPairs]) -> StoredPairs:
    """The pairs of all parts, one behind the other."""
    stores = [store for part in parts for store in part._stores]
    ends = np.cumsum([0] + [part._begins[-1] for part in parts])
    at = [part._at + begin for part, begin in zip(parts, ends[:-1], strict=True)]
    return StoredPairs(stores, np.concatenate(at) if at else None)
