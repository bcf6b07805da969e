"""The trainers that are compared, their requirements and settings."""

from dataclasses import dataclass, field, replace
from typing import Any

MLX = ("mlx>=0.32.4", "mlx[cpu]; sys_platform == 'linux'")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Options and environment variables of a trainer."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    remark: str = ""  # why it is shown, but excluded from the comparison


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """A module that runs jobs, and the environment that it needs."""

    name: str
    module: str
    requirements: tuple[str, ...]  # empty: this project's own environment
    settings: tuple[Setting, ...]  # for speed
    memory_settings: tuple[Setting, ...]  # for one pair in one step
    uses_mlx: bool = True


def _batches(*sizes: int, suffix: str = "", remark: str = "", **options: Any) -> list[Setting]:
    """Return one setting per batch size."""
    return [
        Setting(
            name=f"batch {size}{suffix}", options={"batch_size": size, **options}, remark=remark
        )
        for size in sizes
    ]


def _with_env(settings: list[Setting], name: str, env: dict[str, str]) -> list[Setting]:
    """Return `settings`, and each of them again with environment variables."""
    return settings + [replace(s, name=f"{s.name}, {name}", env=env) for s in settings]


# Remarks on settings that are shown but never selected as the fastest.
NO_REFERENCE = "trains without a reference"
WRONG_GRADIENTS = "its gradients are wrong"

TRAINERS = {
    trainer.name: trainer
    for trainer in (
        Trainer(
            name="ours",
            module="scripts.bench.peer_ours",
            requirements=(),
            settings=(Setting(name="default"),),
            memory_settings=(Setting(name="default"),),
        ),
        Trainer(
            name="trl",
            module="scripts.bench.peer_trl",
            requirements=("torch==2.13.0", "trl==1.16.0", "peft==0.21.2"),
            settings=(
                *_batches(1, 2, 4, precompute=True),
                *_batches(1, 2, 4, suffix=", reference in the step", precompute=False),
            ),
            memory_settings=(
                *_batches(1, precompute=True),
                *_batches(1, suffix=", checkpointing", precompute=True, checkpointing=True),
            ),
            uses_mlx=False,
        ),
        Trainer(
            name="mlx-lm-lora",
            module="scripts.bench.peer_mlx_lm_lora",
            requirements=("mlx-lm-lora==5.10.2", *MLX),
            settings=tuple(
                _with_env(_batches(1, 2, 4), "not compiled", {"MLX_DISABLE_COMPILE": "1"})
            ),
            memory_settings=(
                *_batches(1),
                *_batches(1, suffix=", checkpointing", checkpointing=True),
            ),
        ),
        Trainer(
            name="mlx-tune",
            module="scripts.bench.peer_mlx_tune",
            requirements=("mlx-tune==0.6.0", *MLX),
            settings=(
                *_batches(1, precompute=True),
                *_with_env(
                    _batches(2, 4, precompute=True),
                    "not compiled",
                    {"MLX_TUNE_DISABLE_COMPILE": "1"},
                ),
                *_batches(1, suffix=", no reference", remark=NO_REFERENCE, precompute=False),
            ),
            memory_settings=(
                *_batches(1, precompute=True),
                *_batches(
                    1,
                    suffix=", checkpointing",
                    remark=WRONG_GRADIENTS,
                    precompute=True,
                    checkpointing=True,
                ),
            ),
        ),
        Trainer(
            name="unsloth",
            module="scripts.bench.peer_unsloth",
            requirements=("unsloth_zoo[mlx]==2026.10.9", *MLX),
            settings=(
                *_batches(1, 2, 4, precompute=True),
                *_batches(1, 2, 4, suffix=", not compiled", precompute=True, compiled=False),
            ),
            memory_settings=(
                *_batches(1, precompute=True),
                *_batches(1, suffix=", checkpointing", precompute=True, checkpointing=True),
            ),
        ),
    )
}
