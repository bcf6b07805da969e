"""The benchmark of the start of a run: seconds by phase, and one real start."""

import pytest

from scripts.bench import bench_startup
from scripts.bench.bench_startup import Seconds, medians, split_into_parts


def event(kind, title, at):
    return kind, title, at, 2 * at, 3 * at


def test_seconds_belong_to_the_innermost_phase():
    parts = split_into_parts(
        [
            event("begin", "Loading model x/y", 1.0),  # 1 s of imports
            event("end", "Loading model x/y", 3.0),
            event("begin", "Tokenizing a.jsonl", 4.0),
            event("begin", "Tokenizing a.jsonl", 4.5),
            event("end", "Tokenizing a.jsonl", 6.0),
            event("end", "Tokenizing a.jsonl", 6.5),
            event("end", "step 1", 8.0),
        ]
    )
    assert {name: seconds.wall for name, seconds in parts.items()} == {
        "Importing": 1.0,
        "Loading model": 2.0,
        "other": 1.0,
        "Tokenizing a.jsonl": 2.5,
        "Taking step 1": 1.5,
        "total": 8.0,
    }
    assert parts["total"] == Seconds(8.0, 16.0, 24.0)


def test_a_part_that_a_start_lacks_counts_as_zero():
    runs = [{"a": Seconds(1, 1, 1)}, {"a": Seconds(3, 3, 3), "b": Seconds(2, 2, 2)}, {}]
    assert medians(runs) == {"a": Seconds(1, 1, 1), "b": Seconds(0, 0, 0)}


@pytest.mark.slow
def test_a_start_ends_with_the_first_step(tmp_path, capsys):
    csv = tmp_path / "startup.csv"
    assert bench_startup.main(["--rounds", "1", "--csv", str(csv)]) == 0
    found = csv.read_text()
    for part in ("Importing", "Tokenizing", "Computing reference", "Taking step 1", "total"):
        assert part in found
    assert "| total" in capsys.readouterr().out
