"""Find duplicates, contradictions and leaks among pairs by digests of their texts."""

import json
from array import array
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import numpy as np

from mlx_dpo.data.inspect.findings import FindingLog
from mlx_dpo.schemas.messages import prompt_digest, to_messages
from mlx_dpo.types import PreferenceExample, Text, UnpairedExample

MIN_LEAK_CHARACTERS = 40  # equal completions of this length are no coincidence
IndexPairs = Iterator[tuple[int, int]]  # index of an example and of the one it matches


class ExampleDigests:
    """64-bit digests of the prompts and completions of examples, by which equal texts are found.

    An example takes 49 bytes; 64 bits are enough to tell millions of texts apart.
    """

    def __init__(self) -> None:
        self._location = array("q")
        self._label = array("b")  # 1 or 0 for unpaired examples, -1 for pairs
        self._columns = {
            name: array("Q") for name in ("prompt", "pair", "flipped", "chosen", "rejected")
        }

    def add(self, example: PreferenceExample | UnpairedExample, location: int) -> None:
        """Append the digests of an example; `location` is the index of its row location."""
        prompt = int(prompt_digest(example)[:16], 16)
        if isinstance(example, UnpairedExample):
            first, second = _normalize_completion(example.completion), ""
            label = int(example.desirable)
            # The opposite of an unpaired example has the other label, that of a pair has its
            # completions exchanged.
            content: tuple[Any, ...] = (first, label)
            opposite: tuple[Any, ...] = (first, 1 - label)
        else:
            first = _normalize_completion(example.chosen)
            second = _normalize_completion(example.rejected)
            label, content, opposite = -1, (first, second), (second, first)
        pair, flipped = (_digest([prompt, *parts]) for parts in (content, opposite))
        values = (prompt, pair, flipped, _leak_digest(first), _leak_digest(second))
        self._location.append(location)
        self._label.append(label)
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)

    def __getitem__(self, name: str) -> Any:
        return np.frombuffer(self._columns[name], np.uint64) if self._location else _NONE

    @property
    def locations(self) -> Any:
        """Index of each example's row location, in the `RowLocations` of the log. (B,)"""
        return np.frombuffer(self._location, np.int64) if self._location else _NONE

    def labelled(self, label: int) -> Any:
        """Return the indices of the unpaired examples with label 1 (good) or 0 (bad). (b,)"""
        return np.flatnonzero(np.array(self._label, np.int8) == label)


_NONE = np.zeros(0, np.uint64)


def find_duplicates(digests: ExampleDigests, log: FindingLog) -> None:
    """Log the duplicates, contradictions and opposite labels within one split."""
    locations, prompts = digests.locations, digests["prompt"]
    # A row may make several pairs, and a duplicate pair has a duplicate prompt too: only the
    # first pair of each row, and of each set of duplicates, counts for `duplicate-prompt`.
    first_of_row, first_of_pair = (
        np.unique(column, return_index=True)[1] for column in (locations, digests["pair"])
    )
    first = np.intersect1d(first_of_row, first_of_pair)
    matches = {
        "duplicate-pair": _find_repeats(digests["pair"]),
        "contradiction": _find_matches(digests["flipped"], digests["pair"]),
        "duplicate-prompt": ((first[i], first[j]) for i, j in _find_repeats(prompts[first])),
        "both-labels": _find_opposite_labels(prompts, digests.labelled(1), digests.labelled(0)),
    }
    for check, index_pairs in matches.items():
        for i, j in index_pairs:
            if locations[i] != locations[j]:
                log.add(check, int(locations[i]), related=int(locations[j]))


def find_leaks(train: ExampleDigests, valid: ExampleDigests, log: FindingLog) -> None:
    """Log the training examples whose prompt or completion is also in the held-out split."""
    columns = {"leaked-prompt": ["prompt"], "leaked-answer": ["chosen", "rejected"]}
    for check, names in columns.items():
        held_out = np.concatenate([valid[name] for name in names])
        locations = np.tile(valid.locations, len(names))
        first_match: dict[int, int] = {}
        for name in names:
            for i, j in _find_matches(train[name], held_out):
                first_match.setdefault(i, int(locations[j]))
        for i in sorted(first_match):
            log.add(check, int(train.locations[i]), related=first_match[i])


def _find_repeats(column: Any) -> IndexPairs:
    """Yield the index of each repeated value, and the index of its first occurrence."""
    _, first, inverse = np.unique(column, return_index=True, return_inverse=True)
    for i in np.flatnonzero(first[inverse] != np.arange(len(column))):
        yield int(i), int(first[inverse[i]])


def _find_opposite_labels(prompts: Any, good: Any, bad: Any) -> IndexPairs:
    """Yield the indices of two examples that have the same prompt but opposite labels.

    `prompts` has the prompt digests of all examples. `good` and `bad` have the indices of the
    examples with each label.
    """
    for own, opposite in ((good, bad), (bad, good)):
        for i, j in _find_matches(prompts[own], prompts[opposite]):
            yield int(own[i]), int(opposite[j])


def _find_matches(column: Any, others: Any) -> IndexPairs:
    """Yield a pair (i, j) for each nonzero `column[i]` that also occurs in `others`.

    The value `others[j]` is the first one that equals `column[i]`.
    """
    values, first = np.unique(others, return_index=True)
    if not len(values):
        return
    nearest = np.minimum(np.searchsorted(values, column), len(values) - 1)
    for i in np.flatnonzero((values[nearest] == column) & (column != 0)):
        yield int(i), int(first[nearest[i]])


def _normalize_completion(completion: Text) -> str:
    """Return the completion as text, without white space around the content of its messages."""
    turns = to_messages(completion, "assistant")
    if len(turns) == 1 and turns[0].keys() == {"role", "content"}:
        return str(turns[0]["content"]).strip()
    stripped = [turn | {"content": turn["content"].strip()} for turn in turns]
    return json.dumps(stripped, sort_keys=True, default=str)


def _leak_digest(completion: str) -> int:
    """Return the digest of the completion, or 0 if it is too short to count as a leak."""
    return _digest(completion) if len(completion) >= MIN_LEAK_CHARACTERS else 0


def _digest(value: Any) -> int:
    """Return a 64-bit digest of the value's JSON text; it is never 0."""
    text = json.dumps(value, default=str).encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") or 1
