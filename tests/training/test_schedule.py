import math

import pytest

from mlx_dpo.training.schedule import learning_rate


def rates(total, **more):
    return [learning_rate(s, peak=1.0, total=total, **more) for s in range(total)]


def test_the_warm_up_rises_from_zero_and_the_cosine_falls_to_zero():
    """As in Transformers: ceil(0.25 * 8) = 2 rising steps, then half a cosine over 6."""
    expected = [0.0, 0.5] + [0.5 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]
    assert rates(8, warmup=0.25) == pytest.approx(expected)


def test_a_line_falls_evenly():
    assert rates(5, warmup=0.2, kind="linear") == pytest.approx([0.0, 1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("kind", ["constant", "constant_with_warmup"])
def test_a_constant_stays(kind):
    assert rates(4, warmup=0.0, kind=kind) == [1.0, 1.0, 1.0, 1.0]


def test_a_share_of_a_step_is_a_whole_step_of_warm_up():
    assert rates(5, warmup=0.01)[:2] == [0.0, 1.0]
