"""What the header and the end of a run say about its ranks."""

import pytest

from mlx_dpo.distributed.ranks import Ranks
from mlx_dpo.runs.distributed.describe import EXACT, THREADS, describe_ranks, describe_traffic
from mlx_dpo.runs.distributed.peers import Peers
from mlx_dpo.startup import openblas


@pytest.fixture(autouse=True)
def no_openblas(monkeypatch):
    monkeypatch.setattr(openblas, "num_threads", lambda: 0)


def peers(*hosts, chip="M9", other_chip="M9"):
    ranks = Ranks()
    ranks.size, ranks.backend = len(hosts), "ring"
    chips = [chip] + [other_chip] * (len(hosts) - 1)
    facts = [
        {"host": host, "chip": name, "system": "s"} for host, name in zip(hosts, chips, strict=True)
    ]
    return Peers(ranks, facts)


def test_ranks_are_described_by_host_with_what_they_send():
    """4.5 passes are at most five, on two ranks three rounds, of a gradient each."""
    lines = describe_ranks(peers("a", "b"), 4.5, 1_000_000)
    assert lines == [
        "2 on a, b, by ring; 4.5 passes per step in about 3 rounds; "
        "each rank sends about 3.0 MB per step",
        EXACT,
    ]
    first = describe_ranks(peers("a", "a", "b"), 2, 1_000_000)
    assert first[0].startswith("3 on a (2), b, by ring; 2 passes per step in about 1 round; ")
    assert first[0].endswith("sends about 2.0 MB per step")
    assert first[1].startswith("steps have fewer passes than there are ranks")


def test_weights_that_are_sent_are_named():
    found = peers("a", "b")
    found.ranks.in_lockstep = True
    line = " of gradients, and its part of the frozen weights in each pass"
    assert describe_ranks(found, 4, 1)[0].endswith(line)
    assert "weights" not in describe_ranks(peers("a", "b"), 4, 1)[0]


def test_ranks_on_different_chips_are_not_called_exact():
    assert EXACT not in describe_ranks(peers("a", "b", other_chip="M7"), 4, 1)


def test_the_threads_of_blas_belong_to_what_is_exact(monkeypatch):
    """With several threads one process may give each of two passes at once half of them."""
    monkeypatch.setattr(openblas, "num_threads", lambda: 1)
    assert describe_ranks(peers("a", "b"), 4, 1)[-1] == f"{EXACT}, {THREADS}"
    monkeypatch.setattr(openblas, "num_threads", lambda: 4)
    line = describe_ranks(peers("a", "b"), 4, 1)[-1]
    assert line.startswith("exact: other numbers of ranks have the same bits")
    assert "OPENBLAS_NUM_THREADS=4; one process has other ones" in line


def test_one_rank_says_nothing():
    assert describe_ranks(peers("a"), 4, 1) == describe_traffic(peers("a")) == []


def test_what_was_sent_counts_each_receiver():
    found = peers("a", "b", "c")
    found.ranks.gathered_bytes = 5_000_000
    assert describe_traffic(found) == ["each of the 3 ranks has sent 10 MB"]
