"""Benchmark of TRL on torch: `DPOTrainer` with PEFT, without gradient checkpointing by default."""

from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from scripts.bench import job as bench
from scripts.bench import machine


class TimedTrainer(DPOTrainer):
    """`DPOTrainer` that measures its reference pass; tokenization comes before and is not timed."""

    reference_s: float | None = None

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        began = perf_counter()
        scored = super()._precompute_ref_logps(dataset, name, batch_size)
        self.reference_s = perf_counter() - began
        return scored


def config(job: bench.Job, folder: Path) -> DPOConfig:
    """Return TRL's defaults with the values that the job fixes."""
    batch = min(job.setting["batch_size"], job.step_pairs)
    return DPOConfig(
        output_dir=str(folder),
        beta=job.beta,
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        num_train_epochs=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=max(1, job.step_pairs // batch),
        precompute_ref_log_probs=job.setting["precompute"],
        gradient_checkpointing=job.setting.get("checkpointing", False),
        max_length=None,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )


def load(job: bench.Job) -> Any:
    """Load the model with all weights in memory; a memory-mapped file would be read later."""
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def train(job: bench.Job, folder: Path) -> bench.Result:
    """Run one epoch; the setting puts the reference pass before it or into its steps."""
    torch.set_num_threads(job.threads)
    model = load(job)
    usage = bench.ProcessUsage()
    trainer = TimedTrainer(
        model=model,
        args=config(job, folder),
        train_dataset=Dataset.from_list(bench.read_texts(job)),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=LoraConfig(
            r=job.rank, lora_alpha=job.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    began = perf_counter()
    trainer.train()
    training_s = perf_counter() - began
    rows = trainer.train_dataset
    return bench.Result(
        pairs=len(rows),
        tokens=sum(
            2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
            for row in rows
        ),
        trainable=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        reference_s=trainer.reference_s,
        training_s=training_s,
        peak_bytes=None,
        resident_bytes=usage.memory_growth(),
        cpu_s=usage.cpu_seconds(),
        versions=machine.versions("trl", "torch", "transformers", "peft"),
    )


if __name__ == "__main__":
    bench.run_job(train)
