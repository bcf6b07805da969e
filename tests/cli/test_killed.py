"""`kill -9` at any moment: the run that is resumed ends at the same weights, bit for bit."""

import itertools
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest

from tests.checkpoints import make_checkpoint

MATERIAL = Path(__file__).parents[2] / ".." / "shared" / "material"
PROGRAM = [sys.executable, "-c", "from mlx_dpo.cli import main; main()", "train"]


def start(output, cache, *words):
    return subprocess.Popen(
        [*PROGRAM, *words, "--output", str(output)],
        env=os.environ | {"MLX_DPO_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def uninterrupted(folder, words):
    process = start(folder / "straight", folder / "cache-straight", *words)
    began = time.monotonic()
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return time.monotonic() - began


def rows(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def killed_and_resumed(folder, words, moments):
    """Kill at each of `moments`, then let it end; returns the number of kills.

    A moment is told when a start begins and says when to kill.
    """
    for kills, moment in enumerate(itertools.chain(moments, [None])):
        process = start(folder / "killed", folder / "cache-killed", *words, "--resume")
        killed = False
        if moment is not None:
            killed = wait_until(process, moment())
            process.kill()
        _, errors = process.communicate()
        if process.returncode == 0:
            return kills
        assert killed, errors
    raise AssertionError("the last start was not killed and did not end")


def wait_until(process, due):
    """True when `due` says so, False where the process ended before."""
    while not due():
        if process.poll() is not None:
            return False
        time.sleep(0.01)
    return True


def after_rows(folder, count):
    """A moment: when so many rows of metrics are written."""
    return lambda: lambda: rows(folder / "killed") >= count


def after_seconds(seconds):
    """A moment: so long after the start."""

    def begin():
        end = time.monotonic() + seconds
        return lambda: time.monotonic() >= end

    return begin


def assert_same(folder):
    straight = mx.load(str(folder / "straight" / "adapters.safetensors"))
    killed = mx.load(str(folder / "killed" / "adapters.safetensors"))
    assert straight.keys() == killed.keys()
    for name, value in straight.items():
        assert mx.array_equal(value, killed[name]), name
    steps = [
        [json.loads(line)["step"] for line in (folder / run / "metrics.jsonl").open()]
        for run in ("straight", "killed")
    ]
    assert steps[0] == steps[1]
    assert not list((folder / "killed").rglob(".mlx-dpo-*"))


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_run_killed_three_times_ends_at_the_same_weights(tmp_path):
    make_checkpoint(tmp_path / "base")
    rows = [
        {"prompt": f"What is {i}?", "chosen": f"It is {i}, friend.", "rejected": f"{i * 7} no"}
        for i in range(40)
    ]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [str(pairs), "--model", str(tmp_path / "base"), "--batch-size", "2", "--epochs", "8",
             "--save-steps", "7", "--lora-dropout", "0.1", "--learning-rate", "1e-3"]  # fmt: skip
    uninterrupted(tmp_path, words)
    moments = [after_rows(tmp_path, 5), after_rows(tmp_path, 40), after_rows(tmp_path, 100)]
    assert killed_and_resumed(tmp_path, words, moments) == 3
    assert_same(tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.skipif(not MATERIAL.is_dir(), reason="no real data and models next to the checkout")
def test_real_training_killed_at_twelve_random_moments_ends_at_the_same_weights(tmp_path):
    lines = (MATERIAL / "data" / "hh-harmless-test" / "test.jsonl").read_text().splitlines()
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(lines[:500]) + "\n")
    words = [str(pairs), "--model", str(MATERIAL / "models" / "stories260K"), "--bits", "8",
             "--max-length", "192", "--bad-pairs", "drop", "--save-steps", "2",
             "--learning-rate", "1e-3"]  # fmt: skip
    whole = uninterrupted(tmp_path, words)
    draw = random.Random(1)
    moments = [after_seconds(draw.uniform(0.5, whole / 4)) for _ in range(12)]
    kills = killed_and_resumed(tmp_path, words, moments)
    assert kills >= 6
    assert_same(tmp_path)
