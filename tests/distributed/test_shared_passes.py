"""Passes of a step and of a scoring, shared by 2 and 3 ranks: the bits of one process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_cases(count, folder):
    """Return what each of `count` ranks of `step_cases` has written."""
    target = folder / str(count)
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = [[f"127.0.0.1:{one.getsockname()[1]}"] for one in sockets]
    for one in sockets:
        one.close()
    hosts = folder / f"hosts-{count}.json"
    hosts.write_text(json.dumps(addresses))
    processes = []
    try:
        for rank in range(count):
            names = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)} if count > 1 else {}
            command = [sys.executable, "-m", "tests.distributed.step_cases", str(target)]
            processes.append(subprocess.Popen(command, env=environment | names, cwd=ROOT))
        for process in processes:
            assert process.wait(timeout=300) == 0
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [json.loads(Path(f"{target}-{rank}.json").read_text()) for rank in range(count)]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return run_cases(1, tmp_path_factory.mktemp("one"))[0]


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_end_with_the_bits_of_one_process(count, expected, tmp_path):
    """Weights, metrics, log-probs and errors; the last step has fewer passes than ranks."""
    for rank, found in enumerate(run_cases(count, tmp_path)):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == value, (rank, name)


def test_the_cases_differ(expected):
    """A setting that had no effect would make the comparison above say nothing."""
    weights = [value[0] for value in expected.values() if len(value) == 2]
    assert len(set(weights)) == len(weights) - 1  # recomputation keeps the bits
    assert expected["scores"][2] == 14
    assert "pairs:13" in expected["infinite loss"]
    assert "pairs:13" in expected["infinite score"]
