"""Train toy models with the package's trainer, and load what it wrote."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_dpo import DPOConfig, DPOTrainer, load_policy

Row = Mapping[str, Any]
# Studies measure by themselves, so that no pair is held out and no sample is drawn.
DEFAULTS = {
    "fine_tune_type": "full",
    "valid_fraction": 0.0,
    "samples": 0,
    "save_steps": 1_000_000,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
}


def train(model: Path, rows: Iterable[Row], output: Path, **settings: Any) -> nn.Module:
    """Train `model` on `rows`, write the run to `output`, and return the trained policy.

    Args:
        settings: settings of `DPOConfig` that differ from `DEFAULTS`.
    """
    for _ in train_by_steps(model, rows, output, **settings):
        pass
    return load_policy(str(output)).model


def train_by_steps(
    model: Path, rows: Iterable[Row], output: Path, **settings: Any
) -> Iterator[tuple[int, nn.Module, Mapping[str, Any]]]:
    """Train and yield step, policy and metrics after each step; the policy may be measured.

    A caller that leaves the loop early stops the run.
    """
    values = DEFAULTS | settings | {"model": str(model), "output": str(output)}
    pairs = write_rows(output.with_suffix(".jsonl"), rows)
    config = DPOConfig.from_dict(values | {"pairs": [str(pairs)]})
    with DPOTrainer(config) as trainer:
        trainer.prepare()
        for row in trainer.steps():
            yield int(row["step"]), trainer.policy, row


def write_rows(path: Path, rows: Iterable[Row]) -> Path:
    """Write rows as JSON lines; return `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(dict(row)) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def save_checkpoint(policy: nn.Module, like: Path, folder: Path) -> Path:
    """Write a policy of full fine-tuning as a checkpoint like `like`; return `folder`."""
    shutil.copytree(like, folder)
    weights = dict(tree_flatten(policy.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    return folder
