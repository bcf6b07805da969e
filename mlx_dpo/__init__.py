"""Align a language model with preferences on your own machine: DPO with LoRA on MLX.

from mlx_dpo import DPOConfig, DPOTrainer

config = DPOConfig(model="model", pairs="pairs.jsonl", output="run")
with DPOTrainer(config) as trainer:
    trainer.prepare()
    for row in trainer.train():
        print(row["step"], row)
"""

import warnings
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from mlx_dpo import openblas as blas

blas.use_openblas()  # has to come before the first import of mlx.core, anywhere

from mlx_dpo.config.dpo_config import DPOConfig  # noqa: E402
from mlx_dpo.errors import DPOError  # noqa: E402

if TYPE_CHECKING:
    from mlx_dpo.runs.trainer import DPOTrainer
    from mlx_dpo.saved_runs.evaluate import evaluate_run
    from mlx_dpo.saved_runs.open import load_policy

__version__ = version("mlx-dpo")
__all__ = ["DPOConfig", "DPOError", "DPOTrainer", "evaluate_run", "load_policy"]

# Imported on first use: these modules load the model libraries, which takes seconds.
LAZY = {
    "DPOTrainer": "mlx_dpo.runs.trainer",
    "evaluate_run": "mlx_dpo.saved_runs.evaluate",
    "load_policy": "mlx_dpo.saved_runs.open",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name == "Run":
        message = "`mlx_dpo.Run` is deprecated; use `mlx_dpo.DPOTrainer`"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        name = "DPOTrainer"
    if name in LAZY:
        return getattr(import_module(LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
