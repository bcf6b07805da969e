"""When a rank is lost, by what the ranks last sent."""

import pytest

from mlx_dpo.distributed.lost_ranks import RankState, find_stall, is_missing, is_silent

TIMEOUT = 10.0


def state(rank, **values):
    return RankState(f"rank {rank}", **{"seen_at": 0.0, "progressed_at": 0.0} | values)


def test_silence_is_longer_than_the_timeout():
    assert not is_silent(state(1), 10.0, TIMEOUT)
    assert is_silent(state(1), 10.1, TIMEOUT)


def test_a_heartbeat_shows_progress_if_something_was_done():
    beat = {"step": 1, "operations": 2, "progress": 3, "phase": "", "counts": False}
    rank = state(1)
    rank.update(beat, 5.0)
    rank.update(beat, 6.0)
    assert (rank.seen_at, rank.progressed_at) == (6.0, 5.0)
    rank.update(beat | {"operations": 3}, 7.0)
    assert rank.progressed_at == 7.0


@pytest.mark.parametrize(
    ("left", "others", "expected"),
    [
        ({"exit_code": 0, "operations": 5}, [{"operations": 5}], False),
        ({"exit_code": 0, "operations": 5}, [{"operations": 5}, {"operations": 6}], True),
        ({"exit_code": 0, "operations": 5}, [{"operations": 6, "exit_code": 0}], False),
        ({"operations": 5}, [{"operations": 6}], False),  # it is still there
    ],
)
def test_a_rank_is_missing_if_another_one_has_begun_a_later_operation(left, others, expected):
    ranks = [state(0, **left), *(state(n, **each) for n, each in enumerate(others, 1))]
    assert is_missing(ranks[0], ranks) is expected


def test_a_stall_names_the_rank_that_has_not_begun_the_operation():
    ranks = [state(0, operations=7), state(1, operations=6, progressed_at=3.0)]
    assert find_stall(ranks, 103.0, TIMEOUT) is None
    rank, event = find_stall(ranks, 103.1, TIMEOUT)
    assert (rank.name, event) == ("rank 1", "has made no progress for 100 s")


def test_a_stall_of_all_ranks_in_one_operation_names_all():
    ranks = [state(0, operations=7), state(1, operations=7)]
    assert find_stall(ranks, 101.0, TIMEOUT)[1] == (
        "and all other ranks have made no progress for 101 s"
    )


def test_a_phase_that_shows_no_progress_may_last_longer():
    ranks = [state(0, phase="Loading model"), state(1, operations=1)]
    assert find_stall(ranks, 999.0, TIMEOUT) is None
    assert find_stall(ranks, 1001.0, TIMEOUT)[1] == (
        "has made no progress for 1001 s (Loading model)"
    )
    ranks[0].counts = True
    assert find_stall(ranks, 101.0, TIMEOUT) is not None


def test_a_single_rank_that_is_left_is_not_judged():
    assert find_stall([state(0), state(1, exit_code=0)], 1e6, TIMEOUT) is None
