"""Benchmark of this project: the run of `mlx-dpo train`, through the Python interface."""

from pathlib import Path
from time import perf_counter

from mlx_dpo import DPOConfig, DPOTrainer

# isort: split
import mlx.core as mx

from mlx_dpo.parallel.second_process import peak_memory, reset_peak_memory
from mlx_dpo.profiling.memory import trainable_parameters
from scripts.bench import job as bench
from scripts.bench import machine


def train(job: bench.Job, folder: Path) -> bench.Result:
    """Run one epoch, with reference log-probs computed first, as always."""
    config = DPOConfig(
        model=job.model,
        pairs=job.pairs,
        output=str(folder / "run"),
        valid_fraction=0.0,
        lora_r=job.rank,
        lora_alpha=job.alpha,
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        beta=job.beta,
        batch_size=job.step_pairs,
        max_length=job.max_length,
        **job.setting,
    )
    with DPOTrainer(config) as run:
        run.load()
        mx.clear_cache()
        reset_peak_memory()
        usage, weights = bench.ProcessUsage(), mx.get_active_memory()
        began = perf_counter()
        run.attach()  # including the selection of the scorer
        run.compute_reference_logps()
        scored = perf_counter()
        run.restore()
        for _ in run.steps():
            pass
        trained = perf_counter()
        trainable = trainable_parameters(run.policy)
    pairs = run.inputs.train
    # The second process computes every other pass: it counts, with the memory that is its own.
    peak = peak_memory()
    second = peak - mx.get_peak_memory()
    return bench.Result(
        pairs=len(pairs),
        tokens=sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs),
        trainable=trainable,
        reference_s=scored - began,
        training_s=trained - scored,
        peak_bytes=peak - weights,
        resident_bytes=usage.memory_growth() + second,
        cpu_s=usage.cpu_seconds(with_children=True),
        versions=machine.versions("mlx-dpo", "mlx", "mlx-lm"),
    )


if __name__ == "__main__":
    bench.run_job(train)
