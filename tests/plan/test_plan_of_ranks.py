"""The plan of a run on several ranks: by hand, and the words that it is printed with."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_dpo import DPOConfig
from mlx_dpo.distributed.ranks import CHUNK_BYTES
from mlx_dpo.plan.ranks import (
    FrozenWeights,
    RanksFit,
    describe_ranks,
    estimate_ranks,
    fit_ranks,
)
from mlx_dpo.profiling.device_memory import MemoryBudget
from mlx_dpo.runs.auto_batch_size import MicroBatchFit

WIDTH = 1000
BLOCK = WIDTH * WIDTH * 4  # bytes of the frozen matrix of a block
TRAINED = 2 * 500 * WIDTH * 4


class Block(nn.Module):
    def __init__(self, matrices: int):
        super().__init__()
        self.frozen = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(matrices)]
        for layer in self.frozen:
            layer.freeze()


class Policy(nn.Module):
    """Two blocks of one matrix and one of two, a head, and half a matrix that is trained."""

    def __init__(self):
        super().__init__()
        self.layers = [Block(1), Block(2), Block(1)]
        self.layers[0].adapter = mx.zeros((500, WIDTH))
        self.layers[2].adapter = mx.zeros((500, WIDTH))
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.freeze()


def fit(size: int, room: int, **settings) -> MicroBatchFit:
    config = DPOConfig(
        model="m", pairs=("p",), output="o", **{"batch_size": 8, "micro_batch_size": 2} | settings
    )
    return MicroBatchFit(config, size, MemoryBudget(room, "for a test"))


STEPS = [[10, 20, 30, 40], [50]]  # tokens of the passes


def test_frozen_weights_are_counted_without_what_is_trained():
    found = FrozenWeights.of(Policy())
    assert found == FrozenWeights(shared=4 * BLOCK, whole=BLOCK, largest_block=2 * BLOCK)


def fit_for(ranks, room, size=100_000_000, **settings):
    """Choose passes that need so much memory, or a fifth less if they are recomputed."""
    calls = []

    def choose(config, budget):
        calls.append((config.recompute, budget.bytes))
        needed = size * 4 // 5 if config.recompute else size
        return MicroBatchFit(config, needed, budget, passes_at_once=2)

    start = fit(0, room, **settings).config
    return fit_ranks(ranks, Policy(), start, choose, MemoryBudget(room, "test")), calls


def test_a_plan_has_the_numbers_computed_by_hand():
    chosen, calls = fit_for(2, 10**9)
    assert calls == [(None, 10**9 - 4 * TRAINED)]  # two gradients, and a chunk of each rank
    assert TRAINED < CHUNK_BYTES
    assert chosen.fitted.passes_at_once == 1
    found = estimate_ranks(2, Policy(), chosen, STEPS, 3.0)
    assert (found.passes, found.rounds, found.idle) == (2.5, 1.5, 1 - 5 / 6)
    assert found.sent == 1.5 * TRAINED
    assert found.sent_by_all_reduce == TRAINED
    assert found.bound == pytest.approx(150 / (20 + 40 + 50))
    assert found.memory == found.memory_whole == 100_000_000 + 4 * TRAINED
    assert (found.shard_base, found.fits) == (False, True)
    ethernet = found.links[2]
    assert ethernet.seconds == 1.5 * TRAINED / 0.115e9
    assert ethernet.speedup == pytest.approx(3 / (3 * 110 / 150 + ethernet.seconds))
    assert found.links[0].speedup > found.links[1].speedup > ethernet.speedup


def test_one_rank_is_planned_as_before():
    chosen, calls = fit_for(1, 1000)
    assert calls == [(None, 1000)]
    assert (chosen.absent, chosen.whole_bytes) == (0, 100_000_000)
    assert chosen.fitted.passes_at_once == 2


def test_the_base_is_sharded_if_the_model_does_not_fit_whole():
    """With four ranks each lacks 3/4 of four blocks, and holds the largest block, of two."""
    absent = 3 * BLOCK - 2 * BLOCK
    needed = 100_000_000 + 6 * TRAINED
    whole, _ = fit_for(4, needed)
    assert whole.absent == 0
    chosen, calls = fit_for(4, needed - 1)
    assert calls[1] == (True, needed - 1 - 6 * TRAINED + absent)
    assert (chosen.absent, chosen.whole_bytes) == (absent, needed)
    tight = estimate_ranks(4, Policy(), chosen, STEPS, 3.0)
    assert (tight.shard_base, tight.fits) == (True, True)
    assert tight.memory == 80_000_000 - absent + 6 * TRAINED
    roomy = estimate_ranks(4, Policy(), whole, STEPS, 3.0)
    assert tight.sent - roomy.sent == 2 * 3 * BLOCK  # one round: forward and backward
    weighted = replace(chosen.fitted, config=replace(chosen.fitted.config, use_weighting=True))
    scored = estimate_ranks(4, Policy(), replace(chosen, fitted=weighted), STEPS, 3.0)
    assert scored.sent - roomy.sent == 3 * 3 * BLOCK  # WPO also scores the pairs of the step
    assert tight.links[0].speedup < roomy.links[0].speedup
    lines = describe_ranks(tight, chosen.fitted, 8)
    assert "for a test" not in lines[1]
    assert lines[1].endswith(", with --shard-base; without it 0.12 GB")
    assert any("as one rank with room for the model" in line for line in lines)
    little, _ = fit_for(4, tight.memory - 1)
    found = estimate_ranks(4, Policy(), little, STEPS, 3.0)
    assert (found.shard_base, found.fits) == (True, False)
    assert describe_ranks(found, little.fitted, 8)[1].startswith("more than there is")


def test_the_base_is_whole_without_recomputation():
    chosen, calls = fit_for(4, 1000, recompute=False)
    assert (chosen.absent, len(calls)) == (0, 1)


def test_the_base_is_sharded_as_train_shards_it():
    """It does so by itself if frozen weights take three quarters of the memory, or as it is set."""
    room = 5 * BLOCK * 4 // 3  # five blocks are frozen
    large, small = (fit_for(4, size, size=1000)[0] for size in (room - 4, room + 4))
    assert (large.absent, small.absent) == (BLOCK, 0)
    assert fit_for(4, room - 4, size=1000, shard_base=False)[0].absent == 0
    assert fit_for(4, room + 4, size=1000, shard_base=True)[0].absent == BLOCK


def test_plan_warns_if_exact_sums_cost_more_than_a_tenth_of_a_step():
    steps = [[10] * 8]
    fitted = fit(10**8, 10**9, batch_size=16)
    # Three gradients beyond an all-reduce: 12 MB, a tenth of a second on the slowest link.
    slow, quick = (
        estimate_ranks(2, Policy(), RanksFit(fitted, 1, 0), steps, each) for each in (0.5, 60.0)
    )
    assert slow.links[2].exactness == pytest.approx(
        3 * TRAINED / 0.115e9 / (0.25 + slow.links[2].seconds)
    )
    [warning] = [line for line in describe_ranks(slow, fitted, 8) if "exact sums" in line]
    assert warning.endswith(
        f"cost {slow.links[2].exactness:.0%} of a step with 1 Gbit/s Ethernet: fewer, larger "
        "passes send less, such as --micro-batch-size 8"
    )
    [limited] = [line for line in describe_ranks(slow, fitted, 4) if "exact sums" in line]
    assert limited.endswith("such as --micro-batch-size 4")
    [none] = [line for line in describe_ranks(slow, fitted, 2) if "exact sums" in line]
    assert "not possible" in none
    assert not [line for line in describe_ranks(quick, fitted, 8) if "exact sums" in line]


def test_plan_warns_of_ranks_without_a_pass():
    fitted = fit(10**8, 10**9)
    few = estimate_ranks(3, Policy(), RanksFit(fitted, 1, 0), [[10, 10]], 1.0)
    lines = describe_ranks(few, fitted, 8)
    assert "2 passes per step, in 1 round; 33% of the ranks' turns have no pass" in lines[0]
    assert lines[-1].startswith("steps have fewer passes than there are ranks")
    enough = describe_ranks(replace(few, passes=3, idle=0), fitted, 8)
    assert not [line for line in enough if "fewer passes" in line]
    assert enough[0].endswith("in 1 round")
