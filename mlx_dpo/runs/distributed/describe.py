"""Describe the ranks of a run for the terminal."""

from collections import Counter
from math import ceil

from mlx_dpo.distributed import costs
from mlx_dpo.runs.distributed.handshake import CHANGES_BITS
from mlx_dpo.runs.distributed.peers import Peers
from mlx_dpo.startup import openblas
from mlx_dpo.units import format_bytes

EXACT = "exact: a run on one rank with passes of this size has the same bits, on the same machine"
# One process computes two passes at once with half of its threads each, if it has several.
THREADS = "if it also has one BLAS thread (OPENBLAS_NUM_THREADS=1)"
SAME_THREADS = (
    "exact: other numbers of ranks have the same bits, on the same machine and with passes of this "
    "size and OPENBLAS_NUM_THREADS={}; one process has other ones if it computes two passes at once"
)


def describe_ranks(peers: Peers, passes: float, gradient_bytes: int) -> list[str]:
    """Return lines on ranks, hosts, passes and traffic of a run; none if it has one rank.

    Args:
        passes: average number of passes per step.
        gradient_bytes: gradient of all trained weights.
    """
    ranks = peers.ranks
    if ranks.is_alone:
        return []
    hosts = Counter(peers.hosts)
    where = ", ".join(f"{host} ({count})" if count > 1 else host for host, count in hosts.items())
    most = ceil(passes)
    sent = costs.gathered_gradient_bytes(most, ranks.size, gradient_bytes)
    rounds = costs.count_rounds(most, ranks.size)
    lines = [
        f"{ranks.size} on {where}, by {ranks.backend}; {passes:.2g} passes per step in about "
        f"{rounds} round{'s' * (rounds != 1)}; each rank sends about {format_bytes(sent)} per step"
    ]
    if ranks.in_lockstep:
        lines[0] += " of gradients, and its part of the frozen weights in each pass"
    if passes < ranks.size:
        lines.append(
            "steps have fewer passes than there are ranks, so ranks wait: use a smaller "
            "--micro-batch-size or a larger --batch-size"
        )
    # On different machines a notice says what differs.
    is_exact = all(len({str(facts[name]) for facts in peers.facts}) == 1 for name in CHANGES_BITS)
    return [*lines, *[_describe_exactness()] * is_exact]


def _describe_exactness() -> str:
    """Return which runs have the bits of this one, which depend on the threads of OpenBLAS."""
    threads = openblas.num_threads()  # 0 where MLX does not use it
    if threads > 1:
        return SAME_THREADS.format(threads)
    return f"{EXACT}, {THREADS}" if threads else EXACT


def describe_traffic(peers: Peers) -> list[str]:
    """Return what a rank has sent to the others in the whole run; nothing if it has one rank."""
    ranks = peers.ranks
    if ranks.is_alone:
        return []
    # A gather in a ring passes what a rank sends on to each other rank.
    sent = ranks.gathered_bytes * (ranks.size - 1)
    return [f"each of the {ranks.size} ranks has sent {format_bytes(sent)}"]
