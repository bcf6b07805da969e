import pytest

from mlx_dpo.config.sampling import Sampling
from mlx_dpo.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "`temperature` must be at least 0, got -0.1"),
        ({"temperature": float("nan")}, "`temperature` must be at least 0, got nan"),
        ({"top_p": 0.0}, "`top_p` must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "`top_p` must be above 0 and at most 1, got 1.1"),
        ({"top_k": -1}, "`top_k` must be at least 0, got -1"),
        ({"min_p": 1.5}, "`min_p` must be at least 0 and at most 1, got 1.5"),
        ({"max_tokens": 0}, "`max_tokens` must be at least 1, got 0"),
        ({"seed": -1}, "`seed` must be at least 0 and at most 4.29497e+09, got -1"),
        ({"repetition_penalty": 0.0}, "`repetition_penalty` must be above 0, got 0.0"),
    ],
)
def test_each_setting_has_its_bounds(settings, message):
    with pytest.raises(ConfigError) as caught:
        Sampling(**{"temperature": 1.0} | settings)
    assert str(caught.value) == message


@pytest.mark.parametrize("setting", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"seed": 0}])
def test_a_setting_that_greedy_choice_ignores_is_refused(setting):
    with pytest.raises(ConfigError, match="has no effect with `temperature` 0"):
        Sampling(**setting)
    Sampling(temperature=0.5, **setting)


def test_a_seed_is_drawn_only_where_one_is_used_and_missing():
    assert Sampling().with_seed() == Sampling()
    chosen = Sampling(temperature=1.0, seed=7)
    assert chosen.with_seed() is chosen
    drawn = [Sampling(temperature=1.0).with_seed().seed for _ in range(3)]
    assert len(set(drawn)) == 3
