"""Sharded models of many architectures on real ranks: equal bits, and memory by MLX's count."""

import json
import subprocess
import sys

import pytest

from tests.distributed.rank_pool import ROOT, environment, kill_session, write_hostfile

# Dense, tied, sliding windows, experts, state spaces, hybrids, shared keys, latent attention.
ARCHITECTURES = (
    "llama", "qwen3", "gemma3_text", "gemma3n", "gemma4_text", "qwen3_moe", "gpt_oss", "mixtral",
    "deepseek_v3", "mamba2", "falcon_h1", "nemotron_h", "qwen3_next", "lfm2", "glm4", "olmo2",
)  # fmt: skip


def compare(folder, count, bits, names=ARCHITECTURES):
    hostfile = write_hostfile(folder / "hosts.json", count)
    command = [sys.executable, "-m", "tests.distributed.sharded_architectures", str(bits), *names]
    processes = [
        subprocess.Popen(
            command,
            env=environment(MLX_RANK=str(rank), MLX_HOSTFILE=str(hostfile)),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        for rank in range(count)
    ]
    try:
        output = processes[0].communicate(timeout=900)[0]
        assert processes[0].returncode == 0
    finally:
        for process in processes:
            kill_session(process)
    return [json.loads(line) for line in output.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("count", [2, 3])
def test_sharded_models_have_the_bits_of_whole_ones(tmp_path, count, bits):
    rows = compare(tmp_path, count, bits)
    assert [row["model_type"] for row in rows] == list(ARCHITECTURES)
    for row in rows:
        assert row["differences"], row
        assert not any(row["differences"].values()), row
        # Each block is padded to a multiple of the ranks, and has one number per placeholder.
        assert row["held"] <= row["total"] * (1 / count + 0.05) + 2**12, row
