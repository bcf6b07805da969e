"""Benchmark of mlx-lm-lora: `train_dpo` with a second copy of the model as reference."""

from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm_lora.trainer import dpo_trainer
from mlx_lm_lora.utils import from_pretrained

from scripts.bench import job as bench
from scripts.bench import machine

WORKING_SET = "max_recommended_working_set_size"


def allow_other_backends() -> None:
    """Add the device property that `train_dpo` reads, which only Metal has and uses."""
    info = mx.device_info()
    if WORKING_SET not in info:
        mx.device_info = lambda *_: {**info, WORKING_SET: 0}


def each_batch_once() -> None:
    """Make one epoch use every batch once.

    `train_dpo` builds a new shuffled iterator in every step, so that some batches repeat and
    others are never used. Here its own iterator goes through its own batches once.
    """
    original = dpo_trainer.iterate_dpo_batches
    epoch: list[Iterator[Any]] = []

    def once(dataset: Any, batch_size: int, max_seq_length: int, train: bool = False) -> Any:
        if not epoch:
            epoch.append(original(dataset, batch_size, max_seq_length, train=False))
        return epoch[0]

    dpo_trainer.iterate_dpo_batches = once


def tokenize(job: bench.Job, tokenizer: Any) -> list[dict[str, Any]]:
    """Return rows in the format of its own datasets."""
    rows = []
    for pair in bench.read_texts(job):
        start = len(tokenizer.encode(pair["prompt"]))
        rows.append(
            {
                "chosen": tokenizer.encode(pair["prompt"] + pair["chosen"]),
                "rejected": tokenizer.encode(pair["prompt"] + pair["rejected"]),
                "chosen_prompt_length": start,
                "rejected_prompt_length": start,
            }
        )
    return rows


def train(job: bench.Job, folder: Path) -> bench.Result:
    """Run one epoch; the reference is scored again in every step."""
    allow_other_backends()
    each_batch_once()
    batch = min(job.setting["batch_size"], job.step_pairs)
    adapters = {"rank": job.rank, "scale": job.alpha / job.rank, "dropout": 0.0, "num_layers": -1}
    policy, tokenizer, *_ = from_pretrained(job.model, lora_config=adapters)
    mx.eval(policy.parameters())
    rows = tokenize(job, tokenizer)
    mx.clear_cache()
    mx.reset_peak_memory()
    usage, weights = bench.ProcessUsage(), mx.get_active_memory()
    reference, *_ = from_pretrained(job.model)
    mx.eval(reference.parameters())
    arguments = dpo_trainer.DPOTrainingArgs(
        batch_size=batch,
        iters=len(rows) // batch,
        steps_per_report=len(rows) // batch,
        max_seq_length=job.max_length,
        adapter_file=str(folder / "adapters.safetensors"),
        beta=job.beta,
        grad_checkpoint=job.setting.get("checkpointing", False),
    )
    began = perf_counter()
    dpo_trainer.train_dpo(
        policy, reference, optim.AdamW(job.learning_rate), train_dataset=rows, args=arguments
    )
    trained = perf_counter()
    return bench.Result(
        pairs=len(rows) // batch * batch,
        tokens=sum(len(row["chosen"]) + len(row["rejected"]) for row in rows),
        trainable=sum(value.size for _, value in tree_flatten(policy.trainable_parameters())),
        reference_s=None,
        training_s=trained - began,
        peak_bytes=mx.get_peak_memory() - weights,
        resident_bytes=usage.memory_growth(),
        cpu_s=usage.cpu_seconds(),
        versions=machine.versions("mlx-lm-lora", "mlx", "mlx-lm"),
    )


if __name__ == "__main__":
    bench.run_job(train)
