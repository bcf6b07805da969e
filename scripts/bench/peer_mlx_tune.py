"""Benchmark of mlx-tune: `DPOTrainer`, with precomputed or, in one setting, no reference."""

from pathlib import Path
from time import perf_counter
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_tune import DPOConfig, DPOTrainer, FastLanguageModel

from scripts.bench import job as bench
from scripts.bench import machine

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class TimedTrainer(DPOTrainer):
    """`DPOTrainer` that records the end of tokenization."""

    def _prepare_dpo_batches(self) -> list[dict[str, Any]]:
        self.rows = super()._prepare_dpo_batches()
        self.began = perf_counter()
        return self.rows


def timed_adapters(model: Any) -> list[float]:
    """Record the time when adapters are attached: between reference pass and training."""
    marks: list[float] = []
    original = model._apply_lora

    def apply(*arguments: Any) -> Any:
        marks.append(perf_counter())
        return original(*arguments)

    model._apply_lora = apply
    return marks


def train(job: bench.Job, folder: Path) -> bench.Result:
    """Run one epoch in the order of the pairs, without gradient accumulation."""
    wrapped, tokenizer = FastLanguageModel.from_pretrained(job.model)
    mx.eval(wrapped.model.parameters())
    policy = FastLanguageModel.get_peft_model(
        wrapped,
        r=job.rank,
        lora_alpha=job.alpha,
        target_modules=LINEAR,
        use_gradient_checkpointing=job.setting.get("checkpointing", False),
    )
    marks = timed_adapters(policy)
    mx.clear_cache()
    mx.reset_peak_memory()
    usage, weights = bench.ProcessUsage(), mx.get_active_memory()
    trainer = TimedTrainer(
        model=policy,
        train_dataset=bench.read_texts(job),
        tokenizer=tokenizer,
        args=DPOConfig(
            beta=job.beta,
            precompute_ref_logprobs=job.setting["precompute"],
            output_dir=str(folder),
            learning_rate=job.learning_rate,
            per_device_train_batch_size=job.setting["batch_size"],
            num_train_epochs=1,
            max_seq_length=job.max_length,
        ),
    )
    trainer.train()
    trained = perf_counter()
    return bench.Result(
        pairs=trainer.iters * trainer.batch_size,
        tokens=sum(row["chosen_length"] + row["rejected_length"] for row in trainer.rows),
        trainable=sum(v.size for _, v in tree_flatten(policy.model.trainable_parameters())),
        reference_s=marks[0] - trainer.began if job.setting["precompute"] else None,
        training_s=trained - marks[0],
        peak_bytes=mx.get_peak_memory() - weights,
        resident_bytes=usage.memory_growth(),
        cpu_s=usage.cpu_seconds(),
        versions=machine.versions("mlx-tune", "mlx", "mlx-lm"),
    )


if __name__ == "__main__":
    bench.run_job(train)
