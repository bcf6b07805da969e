"""What ranks cost and gain: bytes sent, memory and time of a step, in closed form.

The sums of a step are exact because each rank gets the gradient of each pass (all-gather) and adds
them in the order of the passes. An all-reduce would send less, but it adds in an order that depends
on the number of ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_dpo.distributed.ranks import CHUNK_BYTES

EXACTNESS_LIMIT = 0.1  # share of a step that exact sums may take before `plan` warns


@dataclass(frozen=True)
class LinkKind:
    """A kind of connection between two machines, with the speed at which a rank sends."""

    name: str
    bytes_per_second: float


# Thunderbolt: 48 Gbit/s, which the author of MLX's ring measured with one cable (pull request 1985
# of ml-explore/mlx). Ethernet: the nominal speed less about a tenth. We measured none of them.
LINKS = (
    LinkKind("Thunderbolt", 6e9),
    LinkKind("10 Gbit/s Ethernet", 1.1e9),
    LinkKind("1 Gbit/s Ethernet", 0.115e9),
)


def count_rounds(passes: int, ranks: int) -> int:
    """Return the number of rounds in which `ranks` ranks compute the passes of a step."""
    return -(-passes // ranks)


def gathered_gradient_bytes(passes: int, ranks: int, gradient_bytes: int) -> int:
    """Return the bytes that each rank sends in a step, to gather the gradient of every pass.

    A gather in a ring passes the gradient of each rank on to all N - 1 others, once per round.
    Ranks without a pass in the last round send as much as the others.
    """
    return count_rounds(passes, ranks) * (ranks - 1) * gradient_bytes


def all_reduced_gradient_bytes(ranks: int, gradient_bytes: int) -> int:
    """Return the bytes that each rank would send in a step for an all-reduce in a ring.

    Each rank sends (N - 1) / N of the gradient to add it up, and as much again to share the sum.
    """
    return 2 * (ranks - 1) * gradient_bytes // ranks


def gathered_weight_bytes(passes: int, ranks: int, shared_bytes: int, forwards: int = 0) -> int:
    """Return the bytes of frozen weights that each rank receives in a step with `--shard-base`.

    A rank lacks (N - 1) / N of the weights. It receives them once in the forward pass of a round
    and once in the backward pass.

    Args:
        shared_bytes: weights of which each rank holds a part.
        forwards: how often the pairs are also scored without gradients, in passes of about this
            number: for losses over whole batches, WPO and a moving reference.
    """
    return (2 + forwards) * count_rounds(passes, ranks) * (ranks - 1) * shared_bytes // ranks


def exchange_buffers(ranks: int, gradient_bytes: int) -> int:
    """Return the memory of a rank in bytes for the sum over ranks, beyond that of a single process.

    The gradient of a pass waits as one array while the next pass is computed, the old sum while the
    new one is put together (measured: 2.1 gradients with 2 and with 3 ranks), and of each rank one
    chunk is gathered at a time.
    """
    if ranks == 1:
        return 0
    return 2 * gradient_bytes + ranks * min(gradient_bytes, CHUNK_BYTES)


def held_weight_bytes(ranks: int, shared_bytes: int, whole_bytes: int, block_bytes: int) -> int:
    """Return the memory of the frozen weights of a rank in bytes, with `--shard-base`.

    Args:
        shared_bytes: weights of which each rank holds a part.
        whole_bytes: weights that each rank holds whole.
        block_bytes: shared weights that are gathered at a time, those of the largest block.
    """
    if ranks == 1:
        return whole_bytes + shared_bytes
    return whole_bytes + -(-shared_bytes // ranks) + block_bytes


def busiest_share(steps: Sequence[Sequence[int]], ranks: int) -> float:
    """Return the time of the steps on several ranks as a share of that of a single process.

    The time of a pass is taken to be proportional to its tokens. Ranks wait for each other after
    each round, which takes as long as its longest pass. Sending takes no time here.

    Args:
        steps: tokens of each pass, for each step, in the order of the passes.
    """
    slowest = sum(
        max(tokens[first : first + ranks])
        for tokens in steps
        for first in range(0, len(tokens), ranks)
    )
    return slowest / sum(map(sum, steps))


def idle_share(passes: Sequence[int], ranks: int) -> float:
    """Return the share of the ranks' turns in which a rank has no pass, from 0 to 1.

    Args:
        passes: number of passes of each step.
    """
    turns = sum(ranks * count_rounds(count, ranks) for count in passes)
    return 1 - sum(passes) / turns


def speedup(step_seconds: float, share: float, sent_bytes: float, link: LinkKind) -> float:
    """Return how many times faster a step on several ranks is than on one.

    Args:
        step_seconds: time of the step on one rank.
        share: time of the passes on several ranks, as a share of `step_seconds`.
        sent_bytes: bytes that each rank sends in a step, while no rank computes.
    """
    return step_seconds / (step_seconds * share + sent_bytes / link.bytes_per_second)


def exactness_share(
    compute_seconds: float, gathered_bytes: float, all_reduced_bytes: float, link: LinkKind
) -> float:
    """Return the share of a step that exact sums take beyond what an all-reduce would take.

    Args:
        compute_seconds: time of the passes of a step on several ranks.
        gathered_bytes: bytes that each rank sends for the exact sum.
        all_reduced_bytes: bytes that each rank would send for an all-reduce.
    """
    step = compute_seconds + gathered_bytes / link.bytes_per_second
    return max(0.0, gathered_bytes - all_reduced_bytes) / link.bytes_per_second / step
