"""The soak script: what it writes, what it must not write, and real runs on this machine."""

import json
import socket
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_dpo.errors import DataError
from scripts.bench import soak_ranks
from scripts.bench.soak_ranks import Attempt, Soak

HOSTS = [
    {"ssh": "anna@left-mac", "ips": ["192.168.7.1"]},
    {"ssh": "right-mac", "ips": ["192.168.7.2"]},
]


@pytest.fixture
def soak(tmp_path):
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps(HOSTS))
    options = soak_ranks.parse(["--hosts", str(hosts), "--output", str(tmp_path / "out.json")])
    return Soak(options, tmp_path)


def attempt(**changes):
    usual = {
        "case": "sigmoid", "kind": "whole", "seconds": 1.0, "statuses": [0], "ended_after": None,
        "adapters_equal": True, "checkpoint_equal": True, "metrics_equal": True, "message": "",
    }  # fmt: skip
    return Attempt(**usual | changes)


def test_a_run_is_right_only_if_it_ended_and_all_is_equal():
    assert attempt().ok
    assert attempt(statuses=[130, 0]).ok
    wrong = [
        attempt(statuses=[1]),
        attempt(statuses=[None, 0]),  # had to be killed, although it could be resumed
        attempt(adapters_equal=False),
        attempt(checkpoint_equal=False),
        attempt(metrics_equal=False),
    ]
    assert not any(each.ok for each in wrong)


def test_results_have_no_names_addresses_and_paths(soak, tmp_path):
    message = f"rank 1 (right-mac): lost 192.168.7.2; see {Path.home()}/x and {tmp_path}/run"
    soak._note(attempt(statuses=[75], message=soak._anonymous(message)))
    text = (tmp_path / "out.json").read_text()
    for private in ("left-mac", "anna", "right-mac", "192.168", str(tmp_path)):
        assert private not in text
    assert "rank 1 (rank-1): lost rank-1; see" in text
    found = json.loads(text)
    assert found["summary"] == {
        "runs": 1, "by_kind": {"whole": 1}, "failed": 1, "did_not_end": 0, "different": 0,
    }  # fmt: skip
    with pytest.raises(DataError, match="a name of a machine"):
        soak._note(attempt(message="right-mac is away"))


def test_results_are_continued_and_those_of_other_ranks_are_not(soak, tmp_path):
    soak._note(attempt())
    assert len(Soak(soak.options, tmp_path).attempts) == 1
    (tmp_path / "hosts.json").write_text(json.dumps([*HOSTS, {"ssh": "third", "ips": ["1.1.1.1"]}]))
    with pytest.raises(DataError, match="other versions, ranks or machines"):
        Soak(soak.options, tmp_path)


def test_arrays_count_and_not_their_order_in_the_file(tmp_path):
    first, second = mx.arange(3), mx.ones((2, 2), mx.bfloat16)
    files = [tmp_path / f"{name}.safetensors" for name in "abcd"]
    mx.save_safetensors(str(files[0]), {"x": first, "y": second})
    mx.save_safetensors(str(files[1]), {"y": second, "x": first}, {"made": "later"})
    mx.save_safetensors(str(files[2]), {"x": first, "y": second.at[0, 0].add(0.01)})
    mx.save_safetensors(str(files[3]), {"x": first, "y": second.reshape(4)})
    found = [soak_ranks.digest([file]) for file in files]
    assert found[0] == found[1]
    assert len(set(found)) == 3
    assert soak_ranks.digest([files[0], tmp_path / "missing.safetensors"]) == ""


def test_the_name_of_this_machine_is_private(tmp_path):
    names = soak_ranks.private_names(None, tmp_path)
    assert (socket.gethostname() in names) == (len(socket.gethostname()) > 2)
    assert list(names) == sorted(names, key=len, reverse=True)


@pytest.mark.slow
def test_runs_on_two_ranks_equal_the_run_on_one(tmp_path):
    output = tmp_path / "soak.json"
    flags = ["--ranks", "2", "--minutes", "0.1", "--output", str(output)]
    assert soak_ranks.main(flags) == 0
    assert soak_ranks.main(flags) == 0  # continues: the second one is interrupted and resumed
    found = json.loads(output.read_text())
    kinds = [each["kind"] for each in found["attempts"]]
    assert kinds[:2] == ["whole", "interrupted, resumed on all"]
    assert [each["ok"] for each in found["attempts"]] == [True] * len(kinds)
