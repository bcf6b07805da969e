"""Align a language model with preferences on your own machine: DPO with LoRA on MLX.

from mlx_dpo import DPOConfig, Run

config = DPOConfig(model="model", pairs="pairs.jsonl", output="run")
with Run(config) as run:
    run.prepare()
    for row in run.train():
        print(row["step"], row)
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from mlx_dpo import openblas as blas

blas.use_openblas()  # has to come before the first import of mlx.core, anywhere

from mlx_dpo.config.dpo_config import DPOConfig  # noqa: E402
from mlx_dpo.errors import DPOError  # noqa: E402

if TYPE_CHECKING:
    from mlx_dpo.saved_runs import Run, evaluate_run, load_policy

__version__ = version("mlx-dpo")
__all__ = ["DPOConfig", "DPOError", "Run", "evaluate_run", "load_policy"]


def __getattr__(name: str) -> Any:
    """The parts that load a model library, when they are first asked for."""
    if name in __all__:
        return getattr(import_module("mlx_dpo.saved_runs"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
