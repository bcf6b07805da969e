"""The undamaged files that are mutated: models, runs, pairs, caches and adapters, all tiny."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from mlx_dpo import DPOConfig, DPOTrainer
from mlx_dpo.data.tokenization import cache as token_cache
from tests.checkpoints import make_checkpoint

REWARD = """\
def vowels(prompt, answer):
    return sum(letter in "aeiou" for letter in answer)
"""
SETTINGS = """\
# a comment
pairs: [pairs.jsonl]
model: base
output: new
learning_rate: 1.0e-3
epochs: 2
batch_size: 4
loss_type: [sigmoid, ipo]
loss_weights: [1.0, 0.5]
lora_target_modules:
  - q_proj
  - v_proj
system: |
  Be brief.
schema: strings
column:
  - prompt=prompt
valid_fraction: 0.25
max_length: 128
report_to: []
thinking: null
"""


COLLECT = ("collect", "--model", "base", "--prompts", "prompts.txt", "--output", "picks.jsonl",
           "--reward", "rewards.py:vowels", "--max-tokens", "4", "--seed", "1")  # fmt: skip
LOOP = ("loop", "pairs.jsonl", "--model", "base", "--output", "loop", "--reward",
        "rewards.py:vowels", "--rounds", "1", "--answers", "2", "--max-tokens", "4",
        "--learning-rate", "0.01", "--batch-size", "2")  # fmt: skip


def make_material(folder: Path) -> Path:
    """Write the undamaged files to a new folder and return it; changes the current folder.

    Paths in the files are relative to the folder, so that its name stands in no file.
    """
    folder.mkdir(parents=True)
    os.chdir(folder)
    os.environ["MLX_DPO_CACHE"] = "cache"
    token_cache.MIN_CACHED_BYTES = 0
    make_checkpoint(Path("base"))
    Path("base/generation_config.json").write_text('{"eos_token_id": 3, "temperature": 0.7}')
    rows = [
        {"prompt": f"What is {i}?", "chosen": f"It is {i}, friend.", "rejected": f"{i * 7} no"}
        for i in range(12)
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("prompts.txt").write_text("".join(f"Where is {n}?\n" for n in range(4)))
    Path("rewards.py").write_text(REWARD)
    Path("settings.yaml").write_text(SETTINGS)
    _train("run")
    _train("unfinished", steps=5)
    shutil.copytree("unfinished", "reported")
    Path("peft").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(Path("run", name), Path("peft", name))
    _shard(Path("base"), Path("sharded"))
    _invoke(COLLECT)
    _invoke(LOOP)
    return folder


def _train(output: str, steps: int | None = None) -> None:
    config = DPOConfig.from_dict(
        {
            "model": "base", "pairs": ["pairs.jsonl"], "output": output, "valid_fraction": 0.25,
            "batch_size": 3, "learning_rate": 1e-3, "epochs": 3, "lora_r": 2, "save_steps": 2,
            "system": "Be brief.", "max_length": 128,
        }
    )  # fmt: skip
    with DPOTrainer(config) as trainer:
        trainer.prepare()
        for number, _ in enumerate(trainer.steps(), start=1):
            if number == steps:
                break


def _shard(model: Path, folder: Path) -> None:
    """Copy a model with its weights in two files and an index."""
    import mlx.core as mx

    shutil.copytree(model, folder)
    (folder / "model.safetensors").unlink()
    weights = sorted(mx.load(str(model / "model.safetensors")).items())
    names = {}
    for number, part in enumerate((weights[::2], weights[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        mx.save_safetensors(str(folder / file), dict(part), metadata={"format": "pt"})
        names |= dict.fromkeys(dict(part), file)
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _invoke(words: Sequence[str]) -> None:
    from click.testing import CliRunner

    from mlx_dpo.cli import cli

    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
