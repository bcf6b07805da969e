"""Benchmark of unsloth-zoo's MLX trainer: `MLXDPOTrainer`, with precomputed reference or without.

Its MLX files refuse systems other than macOS only when the package is imported; with its own switch
`UNSLOTH_ZOO_DISABLE_GPU_INIT` the same files also run on MLX's other backends.
"""

import os
from pathlib import Path
from time import perf_counter
from typing import Any

os.environ.setdefault("UNSLOTH_ZOO_DISABLE_GPU_INIT", "1")

import mlx.core as mx
from mlx.utils import tree_flatten
from unsloth_zoo.mlx import trainer as unsloth
from unsloth_zoo.mlx.loader import FastMLXModel

from scripts.bench import job as bench
from scripts.bench import machine

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Clock:
    """Times of the reference pass, and of the first training batch."""

    def __init__(self) -> None:
        self.reference_s: float | None = None
        self.training_began = 0.0

    def watch(self) -> None:
        """Record the duration of the reference pass, which ends when training begins."""
        original = unsloth.precompute_reference_logps

        def timed(*arguments: Any, **options: Any) -> Any:
            began = perf_counter()
            table = original(*arguments, **options)
            self.training_began = perf_counter()
            self.reference_s = self.training_began - began
            return table

        unsloth.precompute_reference_logps = timed


class TimedTrainer(unsloth.MLXDPOTrainer):  # type: ignore[misc]
    """`MLXDPOTrainer` that records the end of tokenization."""

    clock: Clock

    def _prepare_data(self, *arguments: Any, **options: Any) -> Any:
        prepared = super()._prepare_data(*arguments, **options)
        self.clock.training_began = perf_counter()
        self.trained_rows = prepared[0].rows
        return prepared


def train(job: bench.Job, folder: Path) -> bench.Result:
    """Run one epoch with gradient accumulation."""
    size = job.setting["batch_size"]
    model, tokenizer = FastMLXModel.from_pretrained(
        job.model, max_seq_length=job.max_length, dtype="float32", load_in_4bit=False
    )
    checkpointing = job.setting.get("checkpointing", False)
    policy = FastMLXModel.get_peft_model(
        model,
        r=job.rank,
        lora_alpha=job.alpha,
        target_modules=LINEAR,
        use_gradient_checkpointing=checkpointing,
        max_seq_length=job.max_length,
    )
    mx.eval(policy.parameters())
    mx.clear_cache()
    mx.reset_peak_memory()
    usage, weights = bench.ProcessUsage(), mx.get_active_memory()
    rows = bench.read_texts(job)
    clock = Clock()
    clock.watch()
    trainer = TimedTrainer(
        model=policy,
        tokenizer=tokenizer,
        train_dataset=rows,
        args=unsloth.MLXDPOConfig(
            beta=job.beta,
            precompute_ref_log_probs=job.setting["precompute"],
            output_dir=str(folder),
            learning_rate=job.learning_rate,
            lr_scheduler_type="constant",
            warmup_steps=0,
            max_steps=0,
            num_train_epochs=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=job.step_pairs // size,
            max_seq_length=job.max_length,
            max_length=job.max_length,
            max_prompt_length=None,
            max_grad_norm=1.0,
            append_eos=False,
            compile=job.setting.get("compiled", True),
            use_cce=job.setting.get("chunked_head", True),
            gradient_checkpointing=checkpointing,
            disable_memory_limits=True,
        ),
    )
    trainer.clock = clock
    trainer.train()
    trained = perf_counter()
    return bench.Result(
        pairs=len(rows),
        tokens=sum(len(row.chosen) + len(row.rejected) for row in trainer.trained_rows),
        trainable=sum(v.size for _, v in tree_flatten(policy.trainable_parameters())),
        reference_s=clock.reference_s,
        training_s=trained - clock.training_began,
        peak_bytes=mx.get_peak_memory() - weights,
        resident_bytes=usage.memory_growth(),
        cpu_s=usage.cpu_seconds(),
        versions=machine.versions("unsloth_zoo", "mlx", "mlx-lm"),
    )


if __name__ == "__main__":
    bench.run_job(train)
