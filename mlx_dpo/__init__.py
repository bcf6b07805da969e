"""Align a language model with preferences on your own machine: DPO with LoRA on MLX.

from mlx_dpo import DPOConfig, DPOTrainer

trainer = DPOTrainer(DPOConfig(model="model", pairs="pairs.jsonl", output="run"))
trainer.train()
"""

import os
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlx_dpo import paths
from mlx_dpo.distributed import environment
from mlx_dpo.startup import file_limit, jit_cache, openblas, transformers_scan

openblas.use_openblas()  # has to come before the first import of mlx.core, anywhere
jit_cache.use_private_jit_cache(paths.cache_folder(), environment.guess_rank(os.environ))
file_limit.keep_low_file_limit()  # before the first import of mlx_lm
transformers_scan.speed_up_transformers()

from mlx_dpo.errors import (  # noqa: E402
    ConfigError,
    DataError,
    DPOError,
    ModelError,
    RunError,
    TrainingError,
)

if TYPE_CHECKING:
    __version__: str
    from mlx_dpo import losses
    from mlx_dpo.config.dpo_config import DPOConfig
    from mlx_dpo.data.load import load_pairs
    from mlx_dpo.evaluation.compare import compare_runs
    from mlx_dpo.export.convert import convert
    from mlx_dpo.export.fuse import fuse_run
    from mlx_dpo.runs.trainer import DPOTrainer
    from mlx_dpo.saved_runs.evaluate import evaluate_run
    from mlx_dpo.saved_runs.export_peft import export_run
    from mlx_dpo.saved_runs.open import load_policy

__all__ = [
    "ConfigError",
    "DPOConfig",
    "DPOError",
    "DPOTrainer",
    "DataError",
    "ModelError",
    "RunError",
    "TrainingError",
    "compare_runs",
    "convert",
    "evaluate_run",
    "export_run",
    "fuse_run",
    "load_pairs",
    "load_policy",
    "losses",
]

# Imported on first use: the settings load MLX, and the others the model libraries, which takes
# seconds.
LAZY = {
    "DPOConfig": "mlx_dpo.config.dpo_config",
    "DPOTrainer": "mlx_dpo.runs.trainer",
    "compare_runs": "mlx_dpo.evaluation.compare",
    "convert": "mlx_dpo.export.convert",
    "evaluate_run": "mlx_dpo.saved_runs.evaluate",
    "export_run": "mlx_dpo.saved_runs.export_peft",
    "fuse_run": "mlx_dpo.export.fuse",
    "load_pairs": "mlx_dpo.data.load",
    "load_policy": "mlx_dpo.saved_runs.open",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name == "Run":
        message = "`mlx_dpo.Run` is deprecated; use `mlx_dpo.DPOTrainer`"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        name = "DPOTrainer"
    if name == "__version__":
        return import_module("importlib.metadata").version("mlx-dpo")
    if name == "losses":
        return import_module("mlx_dpo.losses")
    if name in LAZY:
        return getattr(import_module(LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, those that are not imported yet included."""
    return sorted({*globals(), *__all__, "__version__"})
