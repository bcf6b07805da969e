"""The wiring: settings in, artefacts in a run folder out, and run folders opened again."""

from mlx_dpo.runs.evaluation import Evaluation, evaluate_run
from mlx_dpo.runs.policies import load_policy, open_run
from mlx_dpo.runs.training import Run

__all__ = ["Evaluation", "Run", "evaluate_run", "load_policy", "open_run"]
