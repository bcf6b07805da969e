"""Studies: published results about preference optimization, reproduced on small models.

    python -m scripts.studies.optimum             a study: rows, claims and their values
    python -m scripts.studies.optimum --quick     one seed and fewer settings, under a minute

`NAMES` lists them in the order of docs/evidence.md. Each module has a `STUDY`.

    parts/NAME   longer parts of the study NAME
    toy          small worlds, their base models, and exact probabilities and optima
    baselines    published methods that the package lacks, such as PPO
    reporting    what all studies share: claims, rows, figures and the command line
    mutations    faults that the studies have to find
"""

from importlib import import_module

import mlx_dpo  # noqa: F401 (loads OpenBLAS, which has to come before the first import of MLX)
from scripts.studies.reporting.study import Study

NAMES = (
    "optimum",
    "optimum_other_losses",
    "reward_kl",
    "temperature",
    "likelihood_displacement",
    "near_duplicates",
    "ipo_bandit",
    "label_noise",
    "length",
    "overoptimization",
    "lora_and_bits",
    "on_policy",
    "principles",
)


def load_study(name: str) -> Study:
    """Import a study by name."""
    study = import_module(f"scripts.studies.{name}").STUDY
    assert isinstance(study, Study)
    return study
