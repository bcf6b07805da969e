"""Whole training runs through `DPOTrainer`."""

import mlx.core as mx

from mlx_dpo import DPOTrainer


def train(config, *, resume=False, stop_after=None):
    """Return the trainer and its metrics rows; stop after the row of step `stop_after`."""
    with DPOTrainer(config, resume=resume) as trainer:
        trainer.prepare()
        rows = []
        for row in trainer.steps():
            rows.append(row)
            if row["step"] == stop_after:
                trainer.request_stop()
    return trainer, rows


def weights(config):
    """Return the adapter weights of a finished run."""
    return mx.load(f"{config.output}/adapters.safetensors")
