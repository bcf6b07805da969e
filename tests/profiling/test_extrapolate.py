"""The curve through two passes, by hand."""

import pytest

from mlx_dpo.profiling.extrapolate import (
    ProfilePoint,
    extrapolate_seconds,
    fit_memory_curve,
    largest_that_fits,
)
from mlx_dpo.profiling.profile import PassProfile, Usage


def point(fixed, per_layer, pairs, tokens, layers=10):
    return ProfilePoint(PassProfile(Usage(fixed, 0), Usage(per_layer, 0), layers), pairs, tokens)


def test_linear_growth_is_fitted():
    curve = fit_memory_curve(point(500, 2 * 300 * 7, 2, 300), point(350, 150 * 7, 1, 150))
    # Fixed 350 at 150 tokens and 500 at 600: a third of a byte per token, and 300.
    assert curve.bytes(1, 150) == pytest.approx(350 + 10 * 1050)
    assert curve.bytes(2, 300) == pytest.approx(500 + 10 * 4200)
    assert curve.bytes(3, 600) == pytest.approx(300 + 600 + 10 * 3 * 4200)


def test_quadratic_growth_is_fitted():
    curve = fit_memory_curve(point(0, 2 * (100 + 100**2), 2, 100), point(0, 50 + 50**2, 1, 50))
    assert curve.bytes(1, 400) == pytest.approx(10 * (400 + 400**2))


def test_small_noise_is_not_fitted_as_quadratic_growth():
    curve = fit_memory_curve(point(0, 105 * 1000, 1, 1000), point(0, 100 * 500, 1, 500))
    assert curve.bytes(1, 8000) == pytest.approx(10 * 105 * 8000)


def test_noise_never_gives_negative_growth():
    curve = fit_memory_curve(point(90, 1000, 1, 100), point(100, 520, 1, 50))
    assert curve.bytes(1, 1000) == pytest.approx(90 + 10 * 10_000)


@pytest.mark.parametrize(
    ("available", "expected"), [(0, 0), (6, 0), (7, 1), (20, 2), (21, 3), (999, 9)]
)
def test_the_largest_number_that_fits_is_returned(available, expected):
    assert largest_that_fits(lambda n: 7 * n <= available, limit=9) == expected


def test_time_is_a_line_through_two_passes():
    # 2 s a pass, and 3 s for every 100 operations.
    short, long = (100, 5.0), (400, 14.0)
    assert extrapolate_seconds(short, long, passes=10, operations=2000) == pytest.approx(20 + 60)
    # A long pass that seems no dearer, or a negative start, is noise: 14 s for 400, then.
    for noisy in ((100, 14.5), (100, 0.5)):
        assert extrapolate_seconds(noisy, long, passes=10, operations=2000) == pytest.approx(70)
