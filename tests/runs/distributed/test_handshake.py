"""Before a run, ranks compare what must be equal and record what may differ."""

import logging
import threading
from datetime import date
from types import SimpleNamespace

import pytest

from mlx_dpo import DPOConfig
from mlx_dpo.distributed.ranks import Ranks
from mlx_dpo.errors import ConfigError
from mlx_dpo.runs.distributed import handshake
from mlx_dpo.runs.distributed.handshake import (
    add_ranks,
    check_inputs,
    check_run_settings,
    compare_machines,
    share_day,
    share_settings,
)
from mlx_dpo.runs.distributed.peers import Peers, SharedError
from tests.runs.distributed.thread_ranks import run_ranks

HERE = threading.local()  # `rank` of the thread


def compare_as(ranks):
    HERE.rank = ranks.rank
    return compare_machines(ranks)


@pytest.fixture
def second_rank(monkeypatch):
    """Replace a function of the handshake on rank 1."""

    def replace(name, value):
        own = getattr(handshake, name)
        monkeypatch.setattr(handshake, name, lambda: value if HERE.rank else own())

    monkeypatch.setattr("socket.gethostname", lambda: "ab"[HERE.rank])
    return replace


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("software", handshake.software() | {"mlx": "0.1"}, "mlx is 0.1, but "),
        ("software", handshake.software() | {"Python": "3.9"}, "Python is 3.9, but 3"),
        ("_device_facts", {"the device": "metal (Darwin arm64)"}, "the device is metal"),
        ("_blas", "OpenBLAS 0.3.9 with 7 threads", "BLAS is OpenBLAS 0.3.9 with 7 threads, but "),
        (
            "_variables",
            handshake._variables() | {"the variable MLX_ENABLE_TF32": "0"},
            "the variable MLX_ENABLE_TF32 is 0, but not set",
        ),
    ],
)
def test_ranks_that_would_compute_other_numbers_are_refused(second_rank, name, value, expected):
    second_rank(name, value)
    for error in run_ranks(2, compare_as):
        assert isinstance(error, SharedError)
        assert str(error).startswith(f"rank 1 (b): {expected}")
        assert " on rank 0 (a); " in str(error)


def test_what_may_differ_is_recorded(second_rank):
    second_rank("_chip", "M9")
    second_rank("_free_memory_gb", None)
    first, second = run_ranks(2, compare_as)
    assert first.facts == second.facts
    assert [facts["host"] for facts in first.facts] == ["a", "b"]
    assert first.facts[1]["chip"] == "M9"
    assert first.facts[0].keys() == set(handshake.RECORDED)


def started_run(**settings):
    values = {"model": "m", "pairs": "p.jsonl", "output": "run"} | settings
    flags = {name: values.pop(name, False) for name in handshake.FLAGS}
    config = DPOConfig.from_dict(values)
    return SimpleNamespace(config=config, datasets=SimpleNamespace(splits=[]), **flags)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"batch_size": 4}, "`batch_size` is 4, but 16"),
        ({"resume": True}, "`resume` is True, but False"),
    ],
)
def test_other_settings_of_a_rank_are_refused(second_rank, settings, expected):
    def run(ranks):
        own = started_run(**settings if ranks.rank else {"batch_size": 16})
        check_run_settings(compare_as(ranks), own)

    for error in run_ranks(2, run):
        assert isinstance(error, SharedError)
        assert f"rank 1 (b): {expected} on rank 0 (a)" in str(error)


def test_standard_input_is_refused_with_several_ranks(second_rank):
    first, second = run_ranks(
        2, lambda ranks: check_run_settings(compare_as(ranks), started_run(pairs="-"))
    )
    assert type(first) is ConfigError
    assert "several ranks cannot share standard input" in str(first)
    assert type(second) is SharedError
    check_run_settings(compare_as(Ranks()), started_run(pairs="-"))


def test_other_pairs_of_a_rank_are_refused_by_name(second_rank):
    digests = ("1" * 64, "2" * 64)

    def run(ranks):
        check_inputs(compare_as(ranks), {"model": "m", "train": digests[ranks.rank]})

    expected = "rank 1 (b): the training pairs is 222222222222…, but 111111111111… on rank 0 (a)"
    for error in run_ranks(2, run):
        assert expected in str(error)


def test_rank_0_resolves_the_command_line(second_rank):
    calls = []

    def run(ranks):
        return share_settings(compare_as(ranks), lambda: calls.append(ranks.rank) or {"a": [1]})

    assert run_ranks(2, run) == [{"a": [1]}] * 2
    assert calls == [0]


def test_an_error_in_the_command_line_of_rank_0_ends_all(second_rank):
    def fail():
        raise ConfigError("no such flag")

    first, second = run_ranks(2, lambda ranks: share_settings(compare_as(ranks), fail))
    assert (type(first), type(second)) == (ConfigError, SharedError)


def test_the_day_is_that_of_rank_0(monkeypatch):
    monkeypatch.setattr(handshake, "day_of_run", lambda earlier: date(2026, 1, 1 + HERE.rank))

    def run(ranks):
        HERE.rank = ranks.rank
        return share_day(ranks, None)

    assert run_ranks(2, run) == [date(2026, 1, 1)] * 2


def peers_on(*hosts):
    ranks = Ranks()
    ranks.size = len(hosts)
    return Peers(ranks, [{"host": host, "chip": "M1", "system": "s"} for host in hosts])


def test_the_record_says_on_which_ranks_the_steps_were_trained():
    def trained(earlier, step, *hosts):
        record = {"ranks": (earlier or {}).get("ranks")}
        add_ranks(record, peers_on(*hosts), earlier, step)
        parts = record["ranks"] or ()
        return record, [(p["from_step"], [f.get("host") for f in p["ranks"]]) for p in parts]

    alone, parts = trained(None, 0, "a")
    assert parts == []
    both, parts = trained(alone, 3, "a", "b")
    assert parts == [(0, [None]), (3, ["a", "b"])]
    again, parts = trained(both, 6, "a")
    assert parts == [(0, [None]), (3, ["a", "b"]), (6, ["a"])]
    _, parts = trained(again, 3, "c", "d")  # from an earlier checkpoint, as the last was damaged
    assert parts == [(0, [None]), (3, ["c", "d"])]


def test_different_chips_get_one_notice(caplog):
    peers = peers_on("a", "b")
    peers.facts[1]["chip"] = "M4"
    with caplog.at_level(logging.WARNING, logger="mlx_dpo"):
        add_ranks({}, peers, None, 0)
    assert "the ranks have different chips (M1, M4)" in caplog.text


def equal_ranks(size):
    """Return ranks that all have the values of this one."""
    return SimpleNamespace(
        is_alone=False, is_main=True, size=size, all_gather_json=lambda name, value: [value] * size
    )


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (4, []),
        (5, ["5 ranks are more than the 4 pairs of a step (--batch-size), so that in each step "
             "some of them compute no gradient"]),
    ],
)  # fmt: skip
def test_ranks_without_work_are_named(caplog, size, expected):
    config = DPOConfig(model="model", pairs="pairs.jsonl", output="run", batch_size=4)
    run = SimpleNamespace(
        config=config, resume=False, overwrite=False, force=False,
        datasets=SimpleNamespace(splits=[]),
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="mlx_dpo"):
        check_run_settings(Peers(equal_ranks(size), [{"host": "mac"}] * size), run)
    assert caplog.messages == expected
