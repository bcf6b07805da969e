"""Fixtures: a finished run on a tiny checkpoint, and a copy of it as the working directory."""

import json
import shutil
from pathlib import Path

import pytest

from mlx_dpo import DPOConfig, DPOTrainer
from mlx_dpo.runs.folder import RunPaths, write_record
from tests.checkpoints import make_checkpoint
from tests.edited_files import read_entries

GOLDENS = Path(__file__).parent / "goldens" / "publishing"


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Return a folder with `base`, `pairs.jsonl` and a finished `run`, which no test may change."""
    folder = tmp_path_factory.mktemp("trained")
    make_checkpoint(folder / "base")
    rows = [
        {"prompt": f"What is {i}?", "chosen": f"It is {i}, friend.", "rejected": f"{i * 7} no"}
        for i in range(12)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(folder)
    return folder


def train(folder, **settings):
    config = DPOConfig.from_dict(
        {
            "model": str(folder / "base"),
            "pairs": [str(folder / "pairs.jsonl")],
            "output": str(folder / "run"),
            "valid_fraction": 0.25,
            "batch_size": 3,
            "learning_rate": 1e-3,
            "epochs": 4,
            "lora_r": 4,
        }
        | settings
    )
    with DPOTrainer(config) as trainer:
        trainer.prepare()
        list(trainer.steps())
    return trainer


@pytest.fixture
def workplace(trained, tmp_path, monkeypatch):
    """Copy `trained` and enter the copy, whose run names its base and pairs by relative paths."""
    for name in ("base", "run"):
        shutil.copytree(trained / name, tmp_path / name)
    shutil.copyfile(trained / "pairs.jsonl", tmp_path / "pairs.jsonl")
    record = read_entries(tmp_path / "run" / "run.json")
    record["model_folder"] = "../base"
    record["settings"]["pairs"] = ["pairs.jsonl"]
    write_record(RunPaths(tmp_path / "run"), record)
    monkeypatch.chdir(tmp_path)
    return tmp_path
