"""The wiring: settings in, artefacts in a run folder out, and run folders opened again."""

from mlx_dpo.runs.trainer import Run
from mlx_dpo.saved_runs.evaluate import Evaluation, evaluate_run
from mlx_dpo.saved_runs.open import load_policy, open_run

__all__ = ["Evaluation", "Run", "evaluate_run", "load_policy", "open_run"]
