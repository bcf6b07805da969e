"""Estimated memory of a step against measured memory, over shapes, scorers and lengths."""

from statistics import median

import pytest

from mlx_dpo.profiling.bench.shapes import PassShape
from scripts.bench.bench_plan import GRID
from scripts.bench.plans import CONFIGS, Case, compare_memory

SMALL = [
    Case("hybrid", PassShape(24, 12, 12, 1)),
    Case("moe", PassShape(48, 24, 24, 2), recompute=True),
    Case("moe", PassShape(48, 24, 24, 1), bits=4),
]


def name(case):
    return f"{case.shape}-{case.point}-{case.scorer}-{case.bits}-{case.recompute}"


@pytest.mark.parametrize("case", SMALL, ids=name)
def test_estimated_memory_is_what_a_step_takes(case):
    """The median of three decides, because on a CPU MLX runs ahead by a varying amount.

    If the first two are near, so is the median.
    """
    near = pytest.approx(1, abs=0.15)
    comparisons = [compare_memory(case) for _ in range(2)]
    if not all(c.ratio == near and c.ratio_beyond == near for c in comparisons):
        comparisons.append(compare_memory(case))
    assert median(c.ratio for c in comparisons) == near
    assert median(c.ratio_beyond for c in comparisons) == near


@pytest.mark.slow
@pytest.mark.parametrize("case", GRID, ids=name)
def test_estimated_memory_is_within_15_percent_on_the_grid(case):
    assert compare_memory(case).ratio == pytest.approx(1, abs=0.15)


def test_the_grid_covers_all_settings():
    assert len(GRID) >= 12
    assert {case.shape for case in GRID} == CONFIGS.keys()
    assert {case.point.pairs for case in GRID} == {1, 2, 4}
    assert {case.recompute for case in GRID} == {True, False}
    assert {case.scorer for case in GRID} == {"auto", "plain"}
    assert any(case.bits for case in GRID)
