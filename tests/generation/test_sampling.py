import mlx.core as mx
import pytest

from mlx_dpo.config.sampling import Sampling
from mlx_dpo.generation.sampling import make_logits_processors, make_sampler

PROBABILITIES = (0.5, 0.3, 0.15, 0.05)


@pytest.fixture
def uncompiled():
    """Compiling a filter for the CPU takes seconds."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def frequencies(sampling, rows=20_000):
    logprobs = mx.broadcast_to(mx.log(mx.array(PROBABILITIES)), (rows, len(PROBABILITIES)))
    drawn = make_sampler(sampling)(logprobs).tolist()
    return [drawn.count(token) / rows for token in range(len(PROBABILITIES))]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 1.0}, PROBABILITIES),
        # Squares .25 .09 .0225 .0025, together .365.
        ({"temperature": 0.5}, (0.685, 0.247, 0.062, 0.007)),
        ({"temperature": 1.0, "top_k": 2}, (0.625, 0.375, 0, 0)),
        ({"temperature": 1.0, "top_p": 0.9}, (0.526, 0.316, 0.158, 0)),
        ({"temperature": 1.0, "min_p": 0.5}, (0.625, 0.375, 0, 0)),
        ({"temperature": 0.0}, (1, 0, 0, 0)),
    ],
)
def test_tokens_are_drawn_as_often_as_the_settings_say(settings, expected, uncompiled):
    seed = {"seed": 0} if settings["temperature"] else {}
    assert frequencies(Sampling(**settings, **seed)) == pytest.approx(expected, abs=0.012)


def test_each_draw_is_a_new_one():
    sample = make_sampler(Sampling(temperature=1.0, seed=0))
    flat = mx.zeros((1, 1000))
    assert len({sample(flat).item() for _ in range(20)}) > 15


def test_the_penalty_sees_tokens_that_only_the_cache_holds():
    """Penalty 2 over the last 20: +4 becomes +2, -4 becomes -8; token 2 lies 21 back."""
    [penalise] = make_logits_processors(Sampling(repetition_penalty=2.0), [2, 0, *[1] * 18])
    logits = penalise(mx.array([1], mx.uint32), mx.array([[4.0, -4.0, 4.0, 4.0]]))
    assert logits.tolist() == [[2.0, -8.0, 4.0, 4.0]]
    assert make_logits_processors(Sampling()) == []
