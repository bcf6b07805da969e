"""What ranks cost: by hand, for a 4B model with LoRA of rank 16 on all seven linear layers."""

import pytest

from mlx_dpo.distributed import costs
from mlx_dpo.distributed.costs import LINKS, LinkKind
from mlx_dpo.distributed.ranks import CHUNK_BYTES, Ranks

# 36 blocks: query 2560 -> 4096, key and value 2560 -> 1024, output 4096 -> 2560, gate and up
# 2560 -> 9728, down 9728 -> 2560. A of (r, in) and B of (out, r) in float32.
WIDTHS = (2560 + 4096, 2560 + 1024, 2560 + 1024, 4096 + 2560, *[2560 + 9728] * 3)
GRADIENT = 36 * 16 * sum(WIDTHS) * 4


@pytest.mark.parametrize(
    ("ranks", "passes", "gathered", "summed", "seconds"),
    [
        (2, 2, 132, 132, (0.022, 0.12, 1.15)),
        (2, 8, 528, 132, (0.088, 0.48, 4.6)),
        (4, 4, 396, 198, (0.066, 0.36, 3.45)),
        (4, 8, 793, 198, (0.132, 0.72, 6.9)),
        (4, 16, 1585, 198, (0.264, 1.44, 13.8)),
        (2, 7, 528, 132, (0.088, 0.48, 4.6)),  # the last round has one pass
    ],
)
def test_bytes_sent_in_a_step_are_those_computed_by_hand(ranks, passes, gathered, summed, seconds):
    sent = costs.gathered_gradient_bytes(passes, ranks, GRADIENT)
    assert sent / 1e6 == pytest.approx(gathered, abs=0.8)
    assert costs.all_reduced_gradient_bytes(ranks, GRADIENT) / 1e6 == pytest.approx(summed, abs=0.8)
    took = [sent / link.bytes_per_second for link in LINKS]
    assert took == pytest.approx(seconds, rel=0.01)


@pytest.mark.parametrize(
    ("ranks", "weights", "received"), [(2, 18, 18), (2, 40, 40), (4, 40, 60), (1, 40, 0)]
)
def test_each_round_receives_the_missing_weights_twice(ranks, weights, received):
    found = costs.gathered_weight_bytes(ranks, ranks, int(weights * 1e9))
    assert found == int(received * 1e9)
    assert costs.gathered_weight_bytes(3 * ranks, ranks, int(weights * 1e9)) == 3 * found


def test_one_rank_costs_nothing():
    assert costs.gathered_gradient_bytes(8, 1, GRADIENT) == 0
    assert costs.all_reduced_gradient_bytes(1, GRADIENT) == 0
    assert costs.exchange_buffers(1, GRADIENT) == 0
    assert costs.held_weight_bytes(1, 10, 3, 4) == 13
    assert costs.busiest_share([[5, 6, 7], [8]], 1) == 1
    assert costs.idle_share([3, 1], 1) == 0


def test_a_rank_needs_two_gradients_and_a_chunk_of_each_rank():
    assert costs.exchange_buffers(3, 1000) == 5000
    assert costs.exchange_buffers(3, 10 * CHUNK_BYTES) == 23 * CHUNK_BYTES
    assert costs.held_weight_bytes(3, 100, 7, 20) == 7 + 34 + 20


def test_a_round_takes_as_long_as_its_longest_pass():
    steps = [[10, 20, 30, 40, 50], [60]]
    assert costs.busiest_share(steps, 2) == (20 + 40 + 50 + 60) / 210
    assert costs.busiest_share(steps, 3) == (30 + 50 + 60) / 210
    assert costs.idle_share([5, 1], 2) == 1 - 6 / 8
    assert costs.idle_share([5, 1], 3) == 1 - 6 / 9


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_counted_rounds_are_those_that_ranks_run(size):
    """The passes of a round are neighbours, whichever rank computes which."""
    ranks = Ranks()
    ranks.size = size
    tokens = [3, 5, 8, 13, 21, 34, 55]
    rounds = ranks.rounds(len(tokens))
    assert costs.count_rounds(len(tokens), size) == len(rounds)
    slowest = sum(max(tokens[n] for n in numbers if n is not None) for numbers in rounds)
    assert costs.busiest_share([tokens], size) == slowest / sum(tokens)
    idle = sum(numbers.count(None) for numbers in rounds) / (size * len(rounds))
    assert costs.idle_share([len(tokens)], size) == pytest.approx(idle)


def test_speedup_and_exactness_are_those_computed_by_hand():
    link = LinkKind("some cable", 100.0)
    assert costs.speedup(10, 0.5, 0, link) == 2
    assert costs.speedup(10, 0.5, 500, link) == 1  # five seconds to compute, five to send
    assert costs.exactness_share(5, 500, 200, link) == pytest.approx(3 / 10)
    assert costs.exactness_share(5, 200, 200, link) == 0
    assert costs.exactness_share(5, 100, 200, link) == 0  # an all-reduce would send more
