"""Settings, pairs and a checkpoint for whole runs."""

import json

import pytest

from mlx_dpo import DPOConfig
from tests.checkpoints import make_checkpoint

SAMPLE_TOKENS = 4  # of an answer at an evaluation; every run with held-out pairs samples some


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_DPO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def checkpoint_folder(tmp_path):
    return make_checkpoint(tmp_path / "base")


@pytest.fixture
def pairs_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"What is {i}?", "chosen": f"It is {i}, friend.", "rejected": f"{i * 7} no"}
        for i in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def settings(checkpoint_folder, pairs_file, tmp_path):
    return {
        "model": str(checkpoint_folder),
        "pairs": str(pairs_file),
        "output": str(tmp_path / "run"),
        "valid_fraction": 0.25,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "epochs": 2,
        "save_steps": 2,
        "lora_r": 4,
        "lora_dropout": 0.1,
    }


@pytest.fixture
def config(settings):
    return DPOConfig.from_dict(settings)
