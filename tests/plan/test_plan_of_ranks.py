"""The plan of a run on several ranks: by hand, and the words that it is printed with."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_dpo import DPOConfig
from mlx_dpo.distributed.ranks import CHUNK_BYTES
from mlx_dpo.plan.ranks import FrozenWeights, describe_ranks, estimate_ranks
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


def test_a_plan_by_hand():
    found = estimate_ranks(2, Policy(), fit(100_000_000, 10**9), STEPS, 3.0)
    assert (found.passes, found.rounds, found.idle) == (2.5, 1.5, 1 - 5 / 6)
    assert found.sent == 1.5 * TRAINED
    assert found.sent_for_single_sum == TRAINED
    assert found.bound == pytest.approx(150 / (20 + 40 + 50))
    assert found.memory == found.memory_whole == 100_000_000 + 2 * TRAINED + 2 * TRAINED
    assert TRAINED < CHUNK_BYTES
    assert found.memory_sharded == found.memory_whole - 4 * BLOCK + 4 * BLOCK // 2 + 2 * BLOCK
    assert (found.shard_base, found.fits) == (False, True)
    ethernet = found.links[2]
    assert ethernet.seconds == 1.5 * TRAINED / 0.115e9
    assert ethernet.speedup == pytest.approx(3 / (3 * 110 / 150 + ethernet.seconds))
    assert found.links[0].speedup > found.links[1].speedup > ethernet.speedup


def test_the_base_is_divided_if_the_model_does_not_fit_whole():
    """With four ranks each lacks 3/4 of four blocks, and holds the largest block besides."""
    policy, size = Policy(), 100_000_000
    whole = estimate_ranks(4, policy, fit(size, 10**9), STEPS, 3.0)
    assert whole.memory_sharded == whole.memory_whole - 3 * BLOCK + 2 * BLOCK
    tight = estimate_ranks(4, policy, fit(size, whole.memory_whole - 1), STEPS, 3.0)
    assert (tight.shard_base, tight.fits, tight.memory) == (True, True, whole.memory_sharded)
    assert tight.sent - whole.sent == 2 * 3 * BLOCK  # one round: forward and backward
    assert tight.links[0].speedup < whole.links[0].speedup
    lines = describe_ranks(tight, fit(size, whole.memory_whole - 1), 8)
    assert any("per rank with --shard-base, of" in line for line in lines)
    assert any("as one rank with room for the model" in line for line in lines)
    little = estimate_ranks(4, policy, fit(size, whole.memory_sharded - 1), STEPS, 3.0)
    assert (little.shard_base, little.fits) == (True, False)
    assert "more than there is" in describe_ranks(little, fit(size, 0), 8)[1]


def test_exact_sums_that_take_more_than_a_tenth_of_a_step_are_told_with_a_remedy():
    steps = [[10] * 8]
    fitted = fit(10**8, 10**9, batch_size=16)
    # Three gradients beyond a single sum: 12 MB, a tenth of a second on the slowest link.
    slow, quick = (estimate_ranks(2, Policy(), fitted, steps, each) for each in (0.5, 60.0))
    assert slow.links[2].exactness == pytest.approx(
        3 * TRAINED / 0.115e9 / (0.25 + slow.links[2].seconds)
    )
    [warning] = [line for line in describe_ranks(slow, fitted, 8) if "add up" in line]
    assert warning.endswith(
        f"takes {slow.links[2].exactness:.0%} of a step with 1 Gbit/s Ethernet: fewer, larger "
        "passes send less, such as --micro-batch-size 8"
    )
    [limited] = [line for line in describe_ranks(slow, fitted, 4) if "add up" in line]
    assert limited.endswith("such as --micro-batch-size 4")
    [none] = [line for line in describe_ranks(slow, fitted, 2) if "add up" in line]
    assert "not possible" in none
    assert not [line for line in describe_ranks(quick, fitted, 8) if "add up" in line]


def test_ranks_without_a_pass_are_told():
    fitted = fit(10**8, 10**9)
    few = estimate_ranks(3, Policy(), fitted, [[10, 10]], 1.0)
    lines = describe_ranks(few, fitted, 8)
    assert "2 passes per step, in 1 round; 33% of the ranks' turns have no pass" in lines[0]
    assert lines[-1].startswith("steps have fewer passes than there are ranks")
    enough = describe_ranks(replace(few, passes=3, idle=0), fitted, 8)
    assert not [line for line in enough if "fewer passes" in line]
    assert enough[0].endswith("in 1 round")
