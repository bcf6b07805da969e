"""The memory that is planned is the memory that a step takes, over shapes, scorers and lengths."""

from statistics import median

import pytest

from scripts.bench.bench_plan import GRID
from scripts.bench.plans import CONFIGS, Case, compare
from scripts.bench.steps import Point

SMALL = [
    Case("hybrid", Point(24, 12, 12, 1)),
    Case("moe", Point(48, 24, 24, 2), recompute=True),
    Case("moe", Point(48, 24, 24, 1), bits=4),
]


def name(case):
    return f"{case.shape}-{case.point}-{case.scorer}-{case.bits}-{case.recompute}"


@pytest.mark.parametrize("case", SMALL, ids=name)
def test_planned_memory_is_what_a_step_takes(case):
    """By the median of three: on a CPU how far MLX runs ahead depends on time.

    It lies between the first two, which decide where both are near.
    """
    near = pytest.approx(1, abs=0.15)
    found = [compare(case) for _ in range(2)]
    if not all(one.ratio == near and one.ratio_beyond == near for one in found):
        found.append(compare(case))
    assert median(one.ratio for one in found) == near
    assert median(one.ratio_beyond for one in found) == near


@pytest.mark.slow
@pytest.mark.parametrize("case", GRID, ids=name)
def test_planned_memory_is_within_15_percent_on_the_grid(case):
    assert compare(case).ratio == pytest.approx(1, abs=0.15)


def test_the_grid_is_as_wide_as_it_is_said_to_be():
    assert len(GRID) >= 12
    assert {case.shape for case in GRID} == CONFIGS.keys()
    assert {case.point.pairs for case in GRID} == {1, 2, 4}
    assert {case.recompute for case in GRID} == {True, False}
    assert {case.scorer for case in GRID} == {"auto", "plain"}
    assert any(case.bits for case in GRID)
