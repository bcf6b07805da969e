"""Checkpoints with random weights in real shapes: nothing is downloaded."""

import json
import os
import shutil
from pathlib import Path

from mlx_dpo.profiling.bench.shapes import SEED, Shape

STD = 0.04  # near 1/sqrt(hidden), as such models are initialized


def write_checkpoint(folder: Path, shape: Shape, tokenizer: Path) -> None:
    """Write a float32 checkpoint that mlx-lm and transformers load.

    It is written under another name and renamed, so that an existing folder is complete.

    Args:
        tokenizer: folder with the tokenizer's files.
    """
    import mlx.core as mx

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(tokenizer, partial)
    ids = json.loads((tokenizer / "special_ids.json").read_text())
    config = shape.config() | {"eos_token_id": ids["eos"], "pad_token_id": ids["pad"]}
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    mx.random.seed(SEED)
    weights = {
        name: mx.ones(size) if len(size) == 1 else mx.random.normal(size) * STD
        for name, size in shape.tensors().items()
    }
    mx.save_safetensors(str(partial / "model.safetensors"), weights, {"format": "pt"})
    os.replace(partial, folder)
