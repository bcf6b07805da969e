"""The benchmark of several ranks: its arithmetic, and one round of real runs."""

from pathlib import Path

import pytest

from mlx_dpo.errors import DataError
from scripts.bench import ranks
from scripts.bench.ranks import Run, Way


def found(*speeds, adapters="a"):
    return [Run(speed, 10.0, 0.5, adapters) for speed in speeds]


def test_a_speed_leaves_out_the_first_step_and_evaluations():
    rows = [
        {"loss": 0.7, "num_tokens": 100, "tokens_per_second": 1.0},
        {"loss": 0.6, "num_tokens": 300, "tokens_per_second": 100.0},  # 2 s
        {"eval_loss": 0.6},
        {"loss": 0.5, "num_tokens": 600, "tokens_per_second": 50.0},  # 6 s
    ]
    assert ranks.pairs_per_second(rows) == 2 * ranks.BATCH_SIZE / 8


def test_ratios_are_medians_within_a_round():
    """The machine became slower from round to round: medians of each way would hide the ratio."""
    ways = {way.name: way for way in ranks.ways_to_run(2, Path("old"))}
    assert [way.ranks for way in ways.values()] == [1, 1, 2, 1, 1]
    runs = {
        ways[ranks.ONE_THREAD]: found(10.0, 4.0, 1.0),
        ways["2 ranks, one thread each"]: found(19.0, 6.0, 1.6),
        ways[ranks.ALL_THREADS]: found(15.0, 8.0, 2.0),
        ways[f"before: {ranks.ONE_THREAD}"]: found(10.0, 4.0, 2.0),
    }
    rows = {row["way"]: row for row in ranks.rows_of(runs, "test")}
    two = rows["2 ranks, one thread each"]
    assert (two["pairs_per_s"], two["lowest"], two["highest"]) == ("6", "1.6", "19")
    assert two["ratio_to_one_thread"] == "1.600"  # 1.9, 1.5, 1.6
    assert two["ratio_to_all_threads"] == "0.800"  # 1.27, 0.75, 0.8
    assert two["ratio_to_before"] == ""
    assert rows[ranks.ONE_THREAD]["ratio_to_before"] == "1.000"
    assert two["loads"] == "0.5 0.5 0.5"


def test_other_adapters_are_an_error_that_names_the_ways():
    first, second = Way("first", Path(), 1, 1), Way("second", Path(), 2, 1)
    ranks.check_adapters({first: found(1, 1), second: found(1)})
    with pytest.raises(DataError, match="different adapters: first; second"):
        ranks.check_adapters({first: found(1, 1), second: found(1, adapters="b")})


@pytest.mark.slow
def test_a_round_of_runs_has_equal_adapters(tmp_path, capsys):
    csv = tmp_path / "ranks.csv"
    assert ranks.main(["--rounds", "1", "--steps", "2", "--csv", str(csv)]) == 0
    assert "all adapters are equal" in capsys.readouterr().out
    assert "2 ranks, one thread each" in csv.read_text()
