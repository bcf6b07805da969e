"""Whole runs, as a program drives them."""

import mlx.core as mx

from mlx_dpo import DPOTrainer


def train(config, *, resume=False, stop_after=None):
    """The run and its rows; asked to stop after the row of a step."""
    with DPOTrainer(config, resume=resume) as run:
        run.prepare()
        rows = []
        for row in run.steps():
            rows.append(row)
            if row["step"] == stop_after:
                run.request_stop()
    return run, rows


def weights(config):
    """The adapters of a finished run."""
    return mx.load(f"{config.output}/adapters.safetensors")
