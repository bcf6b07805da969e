"""Locations and digests of many examples: exact, and small in memory."""

import tracemalloc

from mlx_dpo.data.files import RowLocations
from mlx_dpo.data.inspect.duplicates import ExampleDigests
from mlx_dpo.types import PreferenceExample


def test_locations_are_restored_unchanged():
    names = ["a.jsonl:1", "a.jsonl:2", "a[0]", "b 3[17]", "x:007", "none", "", "a[1] and a[3]", "5"]
    names += ["9" * 30, "a.jsonl:1"]
    places = RowLocations()
    assert [places[places.add(name)] for name in names] == names


def test_a_repeated_location_is_stored_once():
    places = RowLocations()
    assert [places.add(name) for name in ("a:1", "a:1", "a:2", "a:1")] == [0, 0, 1, 2]


def test_a_million_locations_and_digests_would_fit_into_70_megabytes():
    places, digests = RowLocations(), ExampleDigests()
    pair = PreferenceExample("p", "c" * 100, "r" * 100, "x")
    tracemalloc.start()
    for i in range(5000):
        digests.add(pair, places.add(f"a-rather-long-name-of-a-file-of-pairs.jsonl:{i}"))
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < 5000 * 70
