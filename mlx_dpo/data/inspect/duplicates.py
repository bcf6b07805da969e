"""Pairs held against each other: duplicates, contradictions, leaks. Digests are kept, not texts."""

import json
from array import array
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import numpy as np

from mlx_dpo.data.inspect.findings import Hits
from mlx_dpo.schemas.messages import as_turns, prompt_digest
from mlx_dpo.types import PreferenceExample, Text, UnpairedExample

TELLING = 40  # characters from which on two like answers are no coincidence
Found = Iterator[tuple[int, int]]  # a pair, and the one that it goes with


class Digests:
    """What pairs say, in 48 bytes each; 64 bits tell millions of texts apart."""

    def __init__(self) -> None:
        self._place = array("q")
        self._label = array("b")  # 1 and 0 of judged answers, -1 of pairs
        self._columns = {
            name: array("Q") for name in ("prompt", "pair", "flipped", "chosen", "rejected")
        }

    def add(self, said: PreferenceExample | UnpairedExample, at: int) -> None:
        """A pair, or a judged answer, at a place."""
        prompt = int(prompt_digest(said)[:16], 16)
        if isinstance(said, UnpairedExample):
            one, other, label = _answer(said.completion), "", int(said.desirable)
            # A judged answer is flipped by its judgement, a pair by exchanging its answers.
            told: tuple[tuple[Any, ...], ...] = ((one, label), (one, 1 - label))
        else:
            one, other, label = _answer(said.chosen), _answer(said.rejected), -1
            told = ((one, other), (other, one))
        pair, flipped = (_digest([prompt, *parts]) for parts in told)
        values = (prompt, pair, flipped, _leaking(one), _leaking(other))
        self._place.append(at)
        self._label.append(label)
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)

    def __getitem__(self, name: str) -> Any:
        return np.frombuffer(self._columns[name], np.uint64) if self._place else _NONE

    @property
    def places(self) -> Any:
        """The place of each pair. (B,)"""
        return np.frombuffer(self._place, np.int64) if self._place else _NONE

    def labelled(self, label: int) -> Any:
        """Which entries are judged answers with this label. (b,)"""
        return np.flatnonzero(np.array(self._label, np.int8) == label)


_NONE = np.zeros(0, np.uint64)


def find_alike(digests: Digests, hits: Hits) -> None:
    """What pairs of the same split have in common."""
    places, prompts = digests.places, digests["prompt"]
    # A row may make several pairs, and a pair that was there before brings its prompt along.
    of_rows, new = (np.unique(x, return_index=True)[1] for x in (places, digests["pair"]))
    first = np.intersect1d(of_rows, new)
    rules = {
        "duplicate-pair": _again(digests["pair"]),
        "contradiction": _among(digests["flipped"], digests["pair"]),
        "duplicate-prompt": ((first[i], first[j]) for i, j in _again(prompts[first])),
        "both-labels": _both(prompts, digests.labelled(1), digests.labelled(0)),
    }
    for rule, found in rules.items():
        for i, j in found:
            if places[i] != places[j]:
                hits.add(rule, int(places[i]), other=int(places[j]))


def find_leaks(train: Digests, valid: Digests, hits: Hits) -> None:
    """What training pairs have in common with held-out ones, at the places of the former."""
    rules = {
        "leaked-prompt": ([train["prompt"]], [valid["prompt"]]),
        "leaked-answer": tuple(
            [digests[side] for side in ("chosen", "rejected")] for digests in (train, valid)
        ),
    }
    for rule, (ours, theirs) in rules.items():
        held = np.concatenate(theirs)
        places = np.tile(valid.places, len(theirs))
        found: dict[int, int] = {}
        for column in ours:
            for i, j in _among(column, held):
                found.setdefault(i, int(places[j]))
        for i in sorted(found):
            hits.add(rule, int(train.places[i]), other=found[i])


def _again(column: Any) -> Found:
    """Every entry that was there before, with its first."""
    _, first, inverse = np.unique(column, return_index=True, return_inverse=True)
    for i in np.flatnonzero(first[inverse] != np.arange(len(column))):
        yield int(i), int(first[inverse[i]])


def _both(prompts: Any, good: Any, bad: Any) -> Found:
    """Every good answer with a bad one to the same prompt, and the other way round."""
    for ours, theirs in ((good, bad), (bad, good)):
        for i, j in _among(prompts[ours], prompts[theirs]):
            yield int(ours[i]), int(theirs[j])


def _among(column: Any, others: Any) -> Found:
    """Every entry, but for zeros, that stands among the others, with the first place there."""
    values, first = np.unique(others, return_index=True)
    if not len(values):
        return
    at = np.minimum(np.searchsorted(values, column), len(values) - 1)
    for i in np.flatnonzero((values[at] == column) & (column != 0)):
        yield int(i), int(first[at[i]])


def _answer(completion: Text) -> str:
    """An answer as it is compared: white space around its turns does not count."""
    turns = as_turns(completion, "assistant")
    if len(turns) == 1 and turns[0].keys() == {"role", "content"}:
        return str(turns[0]["content"]).strip()
    stripped = [turn | {"content": turn["content"].strip()} for turn in turns]
    return json.dumps(stripped, sort_keys=True, default=str)


def _leaking(answer: str) -> int:
    return _digest(answer) if len(answer) >= TELLING else 0


def _digest(value: Any) -> int:
    text = json.dumps(value, default=str).encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") or 1
