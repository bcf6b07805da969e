"""Ranks compare values and share errors: all of them end alike, with one message."""

import pytest

from mlx_dpo.distributed.ranks import Ranks, RanksError
from mlx_dpo.errors import ConfigError
from mlx_dpo.runs.distributed.peers import Peers, SharedError
from tests.runs.distributed.thread_ranks import run_ranks

FACTS = ({"host": "anna"}, {"host": "bert"}, {"host": "anna"})


def peers_of(ranks):
    return Peers(ranks, FACTS[: ranks.size])


def test_a_difference_names_rank_host_and_both_values():
    def compare(ranks):
        peers_of(ranks).check_same({"mlx": "1", "Python": 3 + ranks.rank // 2}, "x")

    outcomes = run_ranks(3, compare)
    expected = "rank 2 (anna): Python is 4, but 3 on rank 0 (anna); x"
    assert [type(error) for error in outcomes] == [SharedError] * 3
    assert [str(error) for error in outcomes] == [expected] * 3


def test_equal_values_are_no_error():
    assert run_ranks(2, lambda ranks: peers_of(ranks).check_same({"mlx": "1"}, "x")) == [None] * 2


def test_ranks_that_compare_different_things_are_an_error():
    outcomes = run_ranks(2, lambda ranks: peers_of(ranks).check_same({f"{ranks.rank}": 1}, "x"))
    assert [type(error) for error in outcomes] == [RanksError] * 2


def fail_on(rank, compare=False):
    def run(ranks):
        peers = peers_of(ranks)
        with peers.sharing_errors():
            if ranks.rank == rank:
                raise ConfigError("no such file")
            if compare:
                peers.check_same({"a": 1}, "x")
        return "went on"

    return run


@pytest.mark.parametrize("compare", [False, True])
def test_an_error_of_another_rank_ends_all_and_names_it(compare):
    outcomes = run_ranks(3, fail_on(1, compare))
    assert [type(error) for error in outcomes] == [SharedError] * 3
    assert [str(outcomes[rank]) for rank in (0, 2)] == ["rank 1 (bert): no such file"] * 2


@pytest.mark.parametrize("compare", [False, True])
def test_an_error_of_rank_0_stays_its_own(compare):
    first, *others = run_ranks(3, fail_on(0, compare))
    assert (type(first), str(first)) == (ConfigError, "no such file")
    assert [(type(e), str(e)) for e in others] == [(SharedError, "no such file")] * 2


def test_an_error_that_all_have_is_printed_by_rank_0_alone():
    def run(ranks):
        with peers_of(ranks).sharing_errors():
            raise ConfigError(f"error of {ranks.rank}")

    first, second = run_ranks(2, run)
    assert (type(first), first.is_shared) == (ConfigError, False)
    assert (type(second), second.is_shared) == (SharedError, True)


def test_an_error_that_cannot_be_sent_is_printed_by_its_own_rank():
    def run(ranks):
        with peers_of(ranks).sharing_errors():
            if ranks.rank:
                raise ConfigError("no such file")
            ranks.any("stop", False)

    first, second = run_ranks(2, run)
    assert isinstance(first, RanksError)
    assert (type(second), str(second)) == (ConfigError, "no such file")


def test_no_error_is_lost_or_shared_in_a_single_process():
    with pytest.raises(ConfigError, match="own"), Peers(Ranks(), FACTS[:1]).sharing_errors():
        raise ConfigError("own")


def test_memory_is_shared_by_the_ranks_of_a_host():
    outcomes = run_ranks(3, lambda ranks: peers_of(ranks).on_this_host)
    assert outcomes == [2, 1, 2]
