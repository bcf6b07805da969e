"""Preference losses: log-ratio margins in, one loss per pair out.

Pure MLX. No model, no config object, no mean, no printing: reduction and reporting
belong to the caller.
"""

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.types import PairLogps


def log_ratio_margin(policy: PairLogps, reference: PairLogps) -> mx.array:
    """How far the policy has moved towards chosen, relative to the reference. (B,)

    The ratio of each completion is taken first: policy and reference nearly agree early
    in training, and the difference of two close float32 numbers is exact.
    """
    return (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)


def sigmoid_loss(margin: mx.array, *, beta: float, label_smoothing: float = 0.0) -> mx.array:
    """DPO loss. (B,) -> (B,)

        loss = -(1 - eps) log sigmoid(beta m) - eps log sigmoid(-beta m)

    where m is the log-ratio margin and eps the share of labels taken to be flipped.
    TRL ignores `label_smoothing` for its `sigmoid` loss; here it acts (conservative DPO).

    Args:
        margin: Log-ratio margins in nats, from `log_ratio_margin`.
        beta: Strength of the pull back to the reference, above 0.
        label_smoothing: eps, in [0, 0.5). Zero is the loss of the paper.

    Sources:
        eps = 0: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7.
        eps > 0: Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO".
    """
    kept = -nn.log_sigmoid(beta * margin)
    flipped = -nn.log_sigmoid(-beta * margin)
    return (1 - label_smoothing) * kept + label_smoothing * flipped
