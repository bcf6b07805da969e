"""The comparison of passes of two checkouts."""

from pathlib import Path

import pytest

from scripts.bench import bench_pass


def seconds(user, system=0.0, wall=9.0):
    return {"user_s": user, "system_s": system, "wall_s": wall}


def test_ratios_compare_trees_in_the_same_round():
    """Medians of both trees alone would give 3 / 2."""
    trees = [Path("/old"), Path("/new")]
    rounds = [(1.0, 0.5), (2.0, 3.0), (8.0, 4.0)]
    measured = [
        [{name: seconds(value) for name in bench_pass.PASSES} for value in values]
        for values in rounds
    ]
    old, new, *_ = bench_pass.rows(trees, measured)
    assert (old["tree"], old["user_s"], old["of_first"]) == ("old", "2.00", "1.000")
    assert (new["tree"], new["user_s"], new["of_first"]) == ("new", "3.00", "0.500")


def test_system_seconds_count():
    measured = [[{name: seconds(1.0, other) for name in bench_pass.PASSES} for other in (0.0, 1.0)]]
    _, new, *_ = bench_pass.rows([Path("/old"), Path("/new")], measured)
    assert new["of_first"] == "2.000"


def test_a_folder_that_is_no_checkout_is_refused(tmp_path, capsys):
    """Otherwise the installed package is measured under the folder's name."""
    with pytest.raises(SystemExit):
        bench_pass.parse(["--tree", str(tmp_path)])
    assert "no checkout" in capsys.readouterr().err


@pytest.mark.slow
def test_this_tree_is_measured_in_a_process_of_its_own(capsys):
    assert bench_pass.main(["--shape", "tiny", "--rounds", "1"]) == 0
    assert [line.count("|") for line in capsys.readouterr().out.splitlines()[1:]] == [7] * 4
