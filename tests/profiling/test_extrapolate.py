"""The curve through two passes, by hand."""

import pytest

from mlx_dpo.profiling.extrapolate import (
    ProfilePoint,
    extrapolate_seconds,
    fit_memory_curve,
    largest_that_fits,
)
from mlx_dpo.profiling.profile import PassProfile, Usage


def sized(outside, block, pairs, tokens, blocks=10):
    return ProfilePoint(PassProfile(Usage(outside, 0), Usage(block, 0), blocks), pairs, tokens)


def test_what_grows_with_the_tokens_is_a_line():
    curve = fit_memory_curve(sized(500, 2 * 300 * 7, 2, 300), sized(350, 150 * 7, 1, 150))
    # Outside 350 at 150 tokens and 500 at 600: a third of a byte a token, and 300.
    assert curve.bytes(1, 150) == pytest.approx(350 + 10 * 1050)
    assert curve.bytes(2, 300) == pytest.approx(500 + 10 * 4200)
    assert curve.bytes(3, 600) == pytest.approx(300 + 600 + 10 * 3 * 4200)


def test_what_grows_with_the_square_is_seen():
    curve = fit_memory_curve(sized(0, 2 * (100 + 100**2), 2, 100), sized(0, 50 + 50**2, 1, 50))
    assert curve.bytes(1, 400) == pytest.approx(10 * (400 + 400**2))


def test_a_little_noise_is_not_drawn_out_to_a_square():
    curve = fit_memory_curve(sized(0, 105 * 1000, 1, 1000), sized(0, 100 * 500, 1, 500))
    assert curve.bytes(1, 8000) == pytest.approx(10 * 105 * 8000)


def test_a_cheaper_long_pass_makes_no_negative_growth():
    curve = fit_memory_curve(sized(90, 1000, 1, 100), sized(100, 520, 1, 50))
    assert curve.bytes(1, 1000) == pytest.approx(90 + 10 * 10_000)


@pytest.mark.parametrize(("room", "most"), [(0, 0), (6, 0), (7, 1), (20, 2), (21, 3), (999, 9)])
def test_the_largest_that_fits_is_found(room, most):
    assert largest_that_fits(lambda n: 7 * n <= room, limit=9) == most


def test_time_is_a_line_through_two_passes():
    # 2 s a pass, and 3 s for every 100 operations.
    short, long = (100, 5.0), (400, 14.0)
    assert extrapolate_seconds(short, long, passes=10, operations=2000) == pytest.approx(20 + 60)
    # A long pass that seems no dearer, or a negative start, is noise: 14 s for 400, then.
    for noisy in ((100, 14.5), (100, 0.5)):
        assert extrapolate_seconds(noisy, long, passes=10, operations=2000) == pytest.approx(70)
