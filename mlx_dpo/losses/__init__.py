"""Losses of DPO and its variants as functions of arrays; `LOSSES` lists them all by name."""

from mlx_dpo.losses.catalogue import LOSSES
from mlx_dpo.losses.listwise import lipo_lambda_loss, plackett_luce_loss, rpo_loss
from mlx_dpo.losses.log_ratios import log_ratio_margin, log_ratios
from mlx_dpo.losses.optimal_transport import aot_loss, aot_unpaired_loss
from mlx_dpo.losses.pairwise import (
    discopop_loss,
    dpop_loss,
    exo_pair_loss,
    hinge_loss,
    ipo_loss,
    robust_loss,
    sigmoid_loss,
)
from mlx_dpo.losses.pointwise import (
    apo_down_loss,
    apo_zero_loss,
    bco_pair_loss,
    kto_loss,
    nca_pair_loss,
    sppo_hard_loss,
)
from mlx_dpo.losses.reference_free import cpo_loss, orpo_loss, sft_loss, simpo_loss

__all__ = [
    "LOSSES",
    "aot_loss",
    "aot_unpaired_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "bco_pair_loss",
    "cpo_loss",
    "discopop_loss",
    "dpop_loss",
    "exo_pair_loss",
    "hinge_loss",
    "ipo_loss",
    "kto_loss",
    "lipo_lambda_loss",
    "log_ratio_margin",
    "log_ratios",
    "nca_pair_loss",
    "orpo_loss",
    "plackett_luce_loss",
    "robust_loss",
    "rpo_loss",
    "sft_loss",
    "sigmoid_loss",
    "simpo_loss",
    "sppo_hard_loss",
]
