"""Datasets on disk: the file format, selections, and columns without building pairs."""

import io
import tempfile
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_dpo.data.batches.metadata import pair_metadata
from mlx_dpo.data.columns import (
    COLUMNS,
    column,
    count_shared_pairs,
    lengths_only,
    longest_pairs,
    longest_row,
    pairs_digest,
    prompt_keys,
)
from mlx_dpo.data.dataset import MappedPairs, PairDataset, concatenate, with_mismatched_completions
from mlx_dpo.data.files import RowLocations
from mlx_dpo.data.load import held_out_indices
from mlx_dpo.data.tokenization.pair_file import (
    PairFileWriter,
    pairs_to_arrays,
    read_metadata,
    read_pair_file,
)
from mlx_dpo.types import NO_LIST, RankedPair, TokenizedPair

NAMES = ("a.jsonl", "b and c.json")


def prompt_digest(number):
    return f"{number:064x}"


def pair(i, *, location="a.jsonl:7", label=None, prompt=None, margin=0.0, weight=1.0):
    """Return a pair whose parts have i + 1, 2 and 3 tokens."""
    ids = tuple(range(100 * i, 100 * i + i + 6))
    return TokenizedPair(
        ids[: i + 1], ids[i + 1 : i + 3], () if label is not None else ids[i + 3 :],
        location, prompt_digest(i if prompt is None else prompt), margin, weight, label,
    )  # fmt: skip


PAIRS = [
    pair(0),
    pair(4, location="a.jsonl:12", margin=-1.5),
    pair(1, location="b and c.json[0]", weight=0.25),
    pair(2, location="b and c.json[3] and a.jsonl:2"),
    replace(
        pair(3, location="b and c.json[3] and b and c.json[1]"),
        ranking=RankedPair(2**48 - 1, 2, 0, 4.5, -1.25, 5.75, 3),
    ),
]
UNPAIRED = [pair(i, label=i % 2 == 0, prompt=prompt) for i, prompt in enumerate((5, 5, 6, 5, 7, 7))]


def written(pairs, facts=None):
    """Return the content of a file with the pairs, written in blocks of two."""
    stream, places = io.BytesIO(), RowLocations(NAMES)
    writer = PairFileWriter(stream)
    for start in range(0, len(pairs), 2):
        writer.add(pairs_to_arrays(pairs[start : start + 2], places))
    writer.finish(facts or {})
    return stream.getvalue()


def read(data):
    with tempfile.TemporaryFile() as stream:
        stream.write(data)
        stream.flush()
        return read_pair_file(stream)


def stored(pairs):
    arrays, _ = read(written(pairs))
    return PairDataset([MappedPairs.from_arrays(arrays, RowLocations(NAMES))])


def fields(pairs):
    """Return all fields of the pairs, with the prompt digests, which `==` ignores."""
    return [(pair, pair.prompt_digest) for pair in pairs]


@pytest.mark.parametrize("pairs", [PAIRS, UNPAIRED, PAIRS[:1], []])
def test_pairs_are_read_as_they_were_written(pairs):
    found = stored(pairs)
    assert fields(found) == fields(pairs)
    assert len(found) == len(pairs)
    with pytest.raises(IndexError):
        found[len(pairs)]


part = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5).map(tuple)
anything = st.builds(
    TokenizedPair, part, part, part,
    st.sampled_from([item.location for item in PAIRS]),
    st.integers(0, 2**256 - 1).map(prompt_digest),
    st.floats(allow_nan=False, allow_infinity=False), st.floats(0, 1e6),
    st.none() | st.booleans(),
    st.just(NO_LIST)
    | st.builds(
        RankedPair, st.integers(0, 2**48 - 1), st.integers(0, 9), st.integers(0, 9),
        *[st.floats(allow_nan=False, allow_infinity=False)] * 3, st.integers(1, 99),
    ),
)  # fmt: skip


@given(st.lists(anything, max_size=7))
def test_any_pairs_and_their_columns_are_read_as_they_were_written(pairs):
    found = stored(pairs)
    assert fields(found) == fields(pairs)
    for name in COLUMNS:
        assert column(found, name).tobytes() == column(pairs, name).tobytes(), name
    assert pairs_digest(found) == pairs_digest(pairs)
    assert longest_row(found) == max(map(len, pairs), default=0)


def test_every_column_is_aligned_and_read_only():
    for pairs in (PAIRS[:1], PAIRS[:2], PAIRS):
        arrays, _ = read(written(pairs))
        assert all(array.flags.aligned for array in arrays.values())
        assert not any(array.flags.writeable for array in arrays.values())


def test_locations_have_the_present_names_of_the_files():
    arrays, _ = read(written(PAIRS))
    places = [
        item.location
        for item in PairDataset([MappedPairs.from_arrays(arrays, RowLocations(["x", "y"]))])
    ]
    assert places == ["x:7", "x:12", "y[0]", "y[3] and x:2", "y[3] and y[1]"]


@pytest.mark.parametrize("location", ["c.jsonl:1", "a.jsonl", "a.jsonl:x", "a.jsonl[-1]", ""])
def test_a_location_in_no_file_raises_an_error(location):
    with pytest.raises(ValueError, match="is in none of"):
        RowLocations(NAMES).encode(location)


@pytest.mark.parametrize("at", [0, 5, 200, -1, -40, -41])
def test_a_file_with_one_changed_byte_is_not_read(at):
    data = bytearray(written(PAIRS))
    assert read(data) is not None
    data[at] ^= 1
    assert read(data) is None


@pytest.mark.parametrize("length", [0, 1, 31, 32, 40, 300, -1])
def test_a_truncated_file_is_not_read(length):
    data = written(PAIRS)[:length]
    assert read(data) is None
    assert read_metadata(io.BytesIO(data)) is None


def test_metadata_is_read_without_the_pairs():
    data = written(PAIRS, facts={"name": "über"})
    assert read_metadata(io.BytesIO(data)) == {"name": "über"}
    assert read(data)[1] == {"name": "über"}
    assert read_metadata(io.BytesIO(b"{}" * 40)) is None


# --- views ------------------------------------------------------------------------------


def test_a_selection_has_the_pairs_at_its_indices():
    found = stored(PAIRS).select([4, 0, 0, 2])
    wanted = [PAIRS[i] for i in (4, 0, 0, 2)]
    assert list(found) == wanted
    assert list(found[1:3]) == wanted[1:3]
    assert list(found[::-1]) == wanted[::-1]
    assert found[-1] == wanted[-1]
    assert list(found.select([3, 0])) == [wanted[3], wanted[0]]
    assert pairs_digest(found) == pairs_digest(wanted) != pairs_digest(wanted[::-1])


def test_datasets_are_concatenated_in_their_order():
    parts = [stored(PAIRS[:2]), stored([]), stored(PAIRS[2:]).select([2, 0])]
    wanted = [*PAIRS[:2], PAIRS[4], PAIRS[2]]
    assert list(concatenate(parts)) == wanted
    assert list(concatenate(parts).select([3, 0])) == [wanted[3], wanted[0]]
    assert pairs_digest(concatenate(parts)) == pairs_digest(wanted)


@pytest.mark.parametrize("max_length", [64, 4])
@pytest.mark.parametrize("at", [[0, 1, 2, 3, 4, 5], [5, 5, 2, 0]])
def test_mismatched_completions_are_those_of_a_list(max_length, at):
    """Truncated or not, with all columns."""
    wanted = with_mismatched_completions([UNPAIRED[i] for i in at], max_length)
    found = with_mismatched_completions(stored(UNPAIRED).select(at), max_length)
    assert list(found) == wanted
    assert list(found[1:4]) == wanted[1:4]
    for name in COLUMNS:
        assert column(found, name).tobytes() == column(wanted, name).tobytes(), name
        assert column(found[2:], name).tobytes() == column(wanted[2:], name).tobytes(), name
    assert pairs_digest(found) == pairs_digest(wanted)
    assert pairs_digest(
        with_mismatched_completions(stored(UNPAIRED).select(at[::-1]), max_length)
    ) != pairs_digest(wanted)


def test_metadata_of_a_dataset_is_that_of_its_pairs():
    for ours, theirs in zip(pair_metadata(stored(PAIRS)), pair_metadata(PAIRS), strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.tolist() == theirs.tolist()
    assert pair_metadata(PAIRS).margins.tolist() == [0.0, -1.5, 0.0, 0.0, 0.0]
    assert pair_metadata(UNPAIRED).desirable.tolist() == [True, False] * 3
    assert pair_metadata(PAIRS).places.tolist() == [[0, 1]] * 4 + [[2, 0]]
    assert pair_metadata(PAIRS).scores.tolist() == [[1.0, 0.0]] * 4 + [[4.5, -1.25]]
    assert pair_metadata(PAIRS).lists.tolist() == [0, 1, 2, 3, 4]
    assert pair_metadata(PAIRS).best_worst.tolist() == [False] * 4 + [True]


def test_a_digest_of_the_rankings_is_another_digest():
    """Without them, runs of earlier versions keep the digests that they recorded."""
    plain = [replace(item, ranking=NO_LIST) for item in PAIRS]
    assert pairs_digest(PAIRS) == pairs_digest(plain)
    assert pairs_digest(PAIRS, rankings=True) != pairs_digest(plain, rankings=True)
    assert pairs_digest(stored(PAIRS), rankings=True) == pairs_digest(PAIRS, rankings=True)


def test_the_longest_pairs_come_last_and_ties_keep_their_order():
    pairs = [pair(i, location=f"a.jsonl:{n}") for n, i in enumerate((2, 0, 2, 1))]
    for some in (pairs, stored(pairs)):
        assert longest_pairs(3, some) == [pairs[3], pairs[0], pairs[2]]
        assert longest_pairs(9, some) == [pairs[1], pairs[3], pairs[0], pairs[2]]
        assert longest_pairs(3, some[:2], [], some[2:]) == [pairs[3], pairs[0], pairs[2]]


def test_the_same_prompts_are_held_out_of_a_dataset_as_of_a_list():
    pairs = [pair(i % 5, prompt=i % 7) for i in range(40)]
    view = stored(pairs)
    held = held_out_indices(view, share=0.3, seed=4)
    assert held == held_out_indices(pairs, share=0.3, seed=4)
    assert list(view.select(sorted(held))) == [pairs[i] for i in sorted(held)]
    assert prompt_keys(view) == [bytes.fromhex(item.prompt_digest) for item in pairs]


def test_shared_pairs_are_compared_by_tokens_only():
    other = [pair(0, margin=3.0), pair(9), pair(9)]
    for ours in (PAIRS, stored(PAIRS)):
        for theirs in (other, stored(other)):
            assert count_shared_pairs(ours, theirs) == count_shared_pairs(theirs, ours) == 1
    unpaired = with_mismatched_completions(UNPAIRED, 64)
    assert count_shared_pairs(unpaired, with_mismatched_completions(UNPAIRED[::-1], 64)) == len(
        UNPAIRED
    )


def test_lengths_only_has_the_lengths_of_the_pairs():
    view = stored(PAIRS)
    for sketch, whole in zip(lengths_only(view), PAIRS, strict=True):
        parts = ("prompt", "chosen", "rejected")
        assert [len(getattr(sketch, n)) for n in parts] == [len(getattr(whole, n)) for n in parts]
        assert len(sketch) == len(whole)
    assert lengths_only(PAIRS) is PAIRS
    assert len(lengths_only(view)[1:3]) == 2


def test_different_pairs_have_different_digests():
    changed = [
        PAIRS, PAIRS[::-1], PAIRS[:4], [*PAIRS, PAIRS[0]], UNPAIRED,
        [pair(0, margin=1.0)], [pair(0, weight=0.0)], [pair(0)],
        [pair(0, label=True)], [pair(0, label=False)],
    ]  # fmt: skip
    assert len({pairs_digest(pairs) for pairs in changed}) == len(changed)
    assert np.array_equal(column([], "lengths"), np.zeros((0, 3)))
