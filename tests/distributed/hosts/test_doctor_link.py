"""`doctor --hosts` sees a link that changes values, and ranks that must not work together."""

import json
import subprocess
import sys

import mlx.core as mx
import pytest

from mlx_dpo.cli import doctor_link
from mlx_dpo.distributed.hosts import link_test
from mlx_dpo.distributed.hosts.link_test import LinkReport, Speed, WrongValue, measure_link
from mlx_dpo.distributed.ranks import Ranks


class EchoedRanks(Ranks):
    """Rank 0 of two, of which the other one sends what rank 0 sends."""

    def __init__(self):
        super().__init__()
        self.size = 2

    def _all_gather(self, mine):
        return mx.concatenate([mine, mine])


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(link_test, "SPEED_BYTES", (64, 4096))
    monkeypatch.setattr(link_test, "VALUE_SIZES", (3, 1000))


def test_each_value_that_was_not_sent_is_found(small):
    report = measure_link(EchoedRanks())
    assert {value.sender for value in report.wrong} == {1}  # what rank 0 sent itself is right
    # Both ranks report the same: they are one.
    assert len(report.wrong) == 2 * link_test.VALUE_ROUNDS * 2 * len(link_test.DTYPES)
    assert report.compared == 2 * len(report.wrong)
    assert {(value.size, value.dtype) for value in report.wrong} == {
        (size, dtype) for size in (3, 1000) for dtype in link_test.DTYPES
    }
    assert [speed.size for speed in report.speeds] == [64, 4096]
    assert all(speed.received == speed.size / speed.seconds for speed in report.speeds)
    assert 0 < report.latency <= report.worst_latency


GOOD = LinkReport("ring", 0.0002, 0.001, [Speed(2**20, 0.004, 2.5e8)], 12, [])
BAD = LinkReport("ring", 0.1, 0.1, [], 12, [WrongValue(1, 0, 4097, "float32", 4096)] * 7)


@pytest.fixture
def shown(monkeypatch, capsys):
    """Return a function that runs the test of a link with given results of this and another rank.

    It returns the exit code and the output.
    """

    def run(report, *, as_json=False, **of_rank_1):
        class TwoRanks(EchoedRanks):
            def all_gather_json(self, name, value):
                return [value, value | of_rank_1]

        monkeypatch.setattr("mlx_dpo.distributed.connect.connect", TwoRanks)
        monkeypatch.setattr(link_test, "measure_link", lambda ranks: report)
        return doctor_link.try_link(as_json=as_json), capsys.readouterr().out

    return run


def test_a_good_link_passes(shown):
    code, output = shown(GOOD)
    assert code == 0
    assert "link of 2 ranks by ring" in output
    assert "a small gather   0.20 ms (at most 1.00 ms)" in output
    assert "4.0 ms,     250 MB/s, 2.00 Gbit/s" in output
    assert "12 arrays equal" in output
    assert "FAILED" not in output and "note" not in output


def test_a_wrong_value_fails_with_its_place(shown):
    code, output = shown(BAD)
    assert code == 1
    wrong = "rank 0 received float32 of 4,097 elements from rank 1 with a wrong value at 4,096"
    assert output.count(wrong) == doctor_link.WRONG_SHOWN
    assert "and 2 more" in output


def test_other_versions_fail_with_rank_and_both_values(shown):
    own = doctor_link._describe_this_host()["must_be_same"]
    code, output = shown(GOOD, must_be_same=own | {"mlx": "9.9"})
    assert code == 1
    assert f"rank 1 has 9.9; rank 0 has {own['mlx']}" in output


def test_other_chips_are_noted_and_sleep_is_shown(shown):
    code, output = shown(GOOD, chip="Apple M5 Max", sleeps_after=10, host="mac2")
    assert code == 0
    assert "note       different chips: the ranks of a run agree with each other" in output
    assert "mac2: Apple M5 Max" in output
    assert "sleeps after 10 idle minutes" in output


def test_json_has_no_name_of_a_machine(shown):
    code, output = shown(GOOD, as_json=True, host="annas-mac", system="Darwin by Anna")
    assert code == 0
    record = json.loads(output)
    assert record["ok"] is True
    assert [len(record[key]) for key in ("ranks", "checks")] == [2, 10]
    assert record["link"]["speeds"] == [{"size": 2**20, "seconds": 0.004, "received": 2.5e8}]
    assert "anna" not in output.lower()


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_ranks_of_this_machine_have_a_good_link(count):
    program = "import sys; from mlx_dpo.cli import main; main()"
    command = [sys.executable, "-c", program, "doctor", "--ranks", str(count), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["ok"] and len(record["ranks"]) == count
    assert record["link"]["wrong"] == [] and record["link"]["compared"] > 0
