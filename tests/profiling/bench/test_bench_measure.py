"""Clocks, time budget, memory and counts of the benchmark; no assertion on real seconds."""

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest

from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.data.batches.token_counts import packed_row_tokens, padded_row_tokens, trie_tokens
from mlx_dpo.errors import ConfigError, ModelError
from mlx_dpo.optim.grouped_update import GroupedUpdate
from mlx_dpo.profiling.bench import measure as bench
from mlx_dpo.profiling.bench.device_speed import measure_copy, measure_product
from mlx_dpo.profiling.bench.measure import PAIR, BenchSettings, TimeBudget, measure
from mlx_dpo.profiling.bench.models import build_random_model, load_bench_model
from mlx_dpo.profiling.bench.shapes import SHAPES, PassShape, RandomTokens
from mlx_dpo.profiling.bench.sharing import count_sharing, example_sets, whole_tokens
from mlx_dpo.profiling.bench.waiting_time import time_step, waiting_time
from mlx_dpo.profiling.device_memory import MemoryBudget, available_memory
from mlx_dpo.profiling.memory import total_parameters
from mlx_dpo.runs.build import make_dataset_scorer
from mlx_dpo.types import TokenizedPair
from tests.checkpoints import make_checkpoint

PRODUCT = {"train", "generate_tokens", "select_scorer", "loss_and_gradients"}
PRODUCT_PARTS = {"config": DPOConfig(micro_batch_size=2), "make_scorer": make_dataset_scorer}


class Clock:
    """A clock that goes on by `step` seconds at each look, and when it is told to."""

    def __init__(self, step=0.0):
        self.now, self.step = 100.0, step

    def __call__(self):
        self.now += self.step
        return self.now


def test_the_speed_of_a_product_by_hand():
    """Each look at the clock takes a second, so a batch of one product does."""
    speed = measure_product(2, 3, 4, seconds=1.0, clock=Clock(1.0))
    assert (speed.rows, speed.inner, speed.columns) == (2, 3, 4)
    assert speed.flops == 2 * 2 * 3 * 4


def test_batches_grow_until_the_wait_for_the_device_does_not_count():
    """At 5 ms a look: batches of 1, 2, 4, ...; the fastest per product is the last."""
    speed = measure_product(2, 3, 4, seconds=0.039, clock=Clock(0.005))
    assert speed.flops == pytest.approx(48 * 8 / 0.005)  # 4 batches, of 8 products at last


def test_the_speed_of_a_copy_counts_reading_and_writing():
    copy = measure_copy(4096, seconds=1.0, clock=Clock(1.0))
    assert (copy.size, copy.bytes_per_second) == (4096, 8192.0)


def test_only_waiting_for_the_device_is_counted():
    clock = Clock()
    original = mx.eval
    with waiting_time(clock) as waited:
        clock.now += 5.0  # Python builds
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(clock, "step", 1.0)
            mx.eval(mx.zeros((2,)) + 1)
        clock.now += 7.0
    assert waited.seconds == 1.0
    assert mx.eval is original


class Step:
    """A step of 2 s of building, 3 of waiting, 4 of clipping and 5 of waiting for the update."""

    def __init__(self, clock, clips=True):
        self.clock, self.clips = clock, clips

    def __call__(self):
        self.clock.now += 2.0
        mx.eval(self)
        if self.clips:
            GroupedUpdate.clip(self, None, 1.0)
        mx.synchronize(self)


def test_a_step_is_divided_where_its_gradients_are_clipped(monkeypatch):
    clock = Clock()

    def takes(seconds):
        return lambda *args: setattr(clock, "now", clock.now + seconds)

    monkeypatch.setattr(mx, "eval", takes(3.0))
    monkeypatch.setattr(GroupedUpdate, "clip", takes(4.0))
    monkeypatch.setattr(mx, "synchronize", takes(5.0))
    assert time_step(Step(clock), clock) == (14.0, 5.0, 3.0)
    with pytest.raises(RuntimeError, match="clipped no gradients"):
        time_step(Step(clock, clips=False), clock)


def test_waiting_in_waiting_is_counted_once():
    clock = Clock()
    with waiting_time(clock) as waited:
        inner = waited.timed(lambda: setattr(clock, "now", clock.now + 2.0))
        outer = waited.timed(lambda: (inner(), setattr(clock, "now", clock.now + 1.0)))
        outer()
    assert waited.seconds == 3.0


def test_mlx_s_functions_come_back_after_an_error():
    originals = mx.eval, mx.async_eval, mx.synchronize
    with pytest.raises(KeyboardInterrupt), waiting_time():
        raise KeyboardInterrupt
    assert (mx.eval, mx.async_eval, mx.synchronize) == originals


def test_the_step_has_as_many_pairs_as_fit_into_the_time():
    """Of 100 s, 70 are for rounds; 5 rounds of n pairs of 1 s take 12.5 n."""
    budget = TimeBudget(started=100.0, seconds=100.0, clock=Clock())
    assert budget.choose_pairs(0.1) == 8  # 10 s
    assert budget.choose_pairs(1.4) == 4  # 70 s
    assert budget.choose_pairs(1.41) == 2
    assert budget.choose_pairs(100.0) == 1


def test_rounds_end_with_their_time_but_some_are_measured():
    clock = Clock()
    budget = TimeBudget(started=100.0, seconds=100.0, clock=clock)
    assert [budget.has_time(n, 9.0) for n in (0, 3, 29, 30)] == [True, True, True, False]
    clock.now = 162.0  # the rounds' time ends at 170
    assert [budget.has_time(n, 9.0) for n in (0, 2, 3)] == [True, True, False]
    assert budget.has_time(3, 8.0)
    clock.now = 192.0  # all the time ends at 200
    assert [budget.has_time(n, 9.0) for n in (0, 1)] == [True, False]
    assert budget.has_time(1, 8.0)


def test_the_last_measurements_end_within_all_the_time():
    clock = Clock()
    budget = TimeBudget(started=100.0, seconds=100.0, clock=clock)
    clock.now = 184.0  # 16 s are left
    assert [budget.has_time_for(seconds) for seconds in (16.0, 16.1)] == [True, False]


def test_what_the_sets_share_is_counted():
    """A ranked set has 6 pairs of 100 + 60, 60; whole: 6 x (200 + 120 - 2) tokens."""
    ranked = example_sets(RandomTokens(1000))["4 ranked answers, all pairs"]
    assert len({pair.prompt for pair in ranked}) == 1
    assert len({answer for pair in ranked for answer in (pair.chosen, pair.rejected)}) == 4
    by_name = {each.name: each for each in count_sharing(1000, trie_tokens)}
    assert by_name["4 ranked answers, all pairs"].whole == 6 * 318
    assert by_name["4 ranked answers, all pairs"].computed == 100 + 4 * 59
    assert by_name["4 pairs, system prompt of 600"].computed == 600 + 4 * 218
    assert by_name["4 pairs, prompts differ"].computed == 4 * 218
    assert by_name["dialogue, a pair at each of 4 turns"].computed == 4 * 218 + 3
    for each in count_sharing(1000, padded_row_tokens):
        assert each.saved < 0.1, each  # whole rows share nothing
    assert whole_tokens([TokenizedPair((1, 2, 3), (4,), (5, 6))]) == 2 * 3 + 0 + 1


def test_a_turn_of_the_dialogue_begins_with_the_turn_before():
    name = "dialogue, a pair at each of 4 turns"
    pairs = example_sets(RandomTokens(1000))[name]
    for before, after in pairwise(pairs):
        said = before.prompt + before.chosen
        assert after.prompt[: len(said)] == said


def test_random_models_have_the_stated_size_and_dtype():
    base = build_random_model("tiny")
    assert total_parameters(base.model) == SHAPES["tiny"].parameters()
    assert base.dtype == "float32"
    assert PAIR.draw(50) == PAIR.draw(50)


def test_a_model_that_does_not_fit_is_refused_before_it_is_allocated():
    room = MemoryBudget(200_000_000, "MLX's limit on this machine")
    before = mx.get_active_memory()
    with pytest.raises(ConfigError) as refused:
        load_bench_model(None, shape="smollm2-135m", bits=None, pairs=PAIR.draw(2), room=room)
    assert mx.get_active_memory() - before < 1_000_000
    message = str(refused.value)
    assert message.startswith("shape of smollm2-135m: a step needs about 0.")
    assert "and there are 0.20 GB (MLX's limit on this machine); use a smaller model" in message
    assert "\n" not in message


def test_between_the_bound_and_the_weights_memory_is_measured():
    """The bound of the tiny shape is 36 MB; a step takes less, and more than its weights."""
    pairs = PAIR.draw(2)
    load = {"shape": "tiny", "bits": None, "pairs": pairs}
    load_bench_model(None, room=MemoryBudget(30_000_000, "here"), **load)
    with pytest.raises(ConfigError, match="a step needs about"):
        load_bench_model(None, room=MemoryBudget(2_000_000, "here"), **load)


def test_a_model_with_a_short_context_is_refused(tmp_path):
    make_checkpoint(tmp_path / "base", max_position_embeddings=100)
    with pytest.raises(ConfigError, match="a context of 100 tokens, and the pairs have 152"):
        load_bench_model(
            str(tmp_path / "base"), shape="", bits=None, pairs=PAIR.draw(2), room=available_memory()
        )


def test_nothing_is_downloaded(monkeypatch):
    monkeypatch.setattr("mlx_dpo.models.download._download", None)
    with pytest.raises(ModelError, match="not in the Hub's cache; nothing is downloaded here"):
        measure(BenchSettings(source="nobody/no-such-model"), **PRODUCT_PARTS)


@pytest.fixture(scope="module")
def measured():
    """Return the figures of the tiny shape, and the names of the functions that were called."""
    called = set()

    def trace(name, function):
        def traced(*args, **more):
            called.add(name)
            return function(*args, **more)

        return traced

    with pytest.MonkeyPatch.context() as patch:
        for name in PRODUCT:
            patch.setattr(bench, name, trace(name, getattr(bench, name)))
        figures = measure(BenchSettings(shape="tiny", seconds=0.5), **PRODUCT_PARTS)
    return figures, called


@pytest.fixture
def figures(measured):
    return measured[0]


def test_all_figures_are_numbers_and_shares_add_up(figures):
    values = [
        value
        for kind in ("step", "reference", "evaluation")
        for value in vars(figures.speed(kind)).values()
        if isinstance(value, float)
    ]
    assert np.isfinite(values).all() and min(values) > 0
    assert sum(vars(figures.time_shares()).values()) == pytest.approx(1)
    assert figures.peak_bytes > 100_000


def test_work_is_that_of_the_scorer(figures):
    pairs = PassShape(PAIR.prompt, PAIR.chosen, PAIR.rejected, figures.work.pairs).draw(2048)
    assert figures.work.tokens == packed_row_tokens(pairs).total
    assert figures.work.step_flops > figures.work.evaluation_flops > figures.work.reference_flops


def test_the_rounds_run_the_trainer_s_own_step_and_scorer(measured):
    """The rates are those of the product only if its loop and its scorer are called."""
    assert measured[1] == PRODUCT
