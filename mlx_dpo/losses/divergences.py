"""f-divergences between policy and reference, whose scores replace the log-ratios in losses.

For the divergence with generator f the score is f'(t) of the ratio t = π(y) / π_ref(y). The
implicit reward has a further term that cannot be computed. The term cancels if the rewards of two
completions of one prompt are subtracted, so only losses of such reward margins are defined.

Source: Wang et al. 2023, arXiv:2309.16240. The constant in each score is TRL's; it matters for
losses that divide scores by the number of tokens.
"""

import math
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
# Exponentials continue as their tangent above this exponent: float32 can then hold the square
# of every score, and a completion that has become very unlikely still gets a gradient. TRL cuts
# at 80 (alpha), where the gradient is zero, or nowhere (forward KL), and overflows at 88.
LARGEST_EXPONENT = 30.0


@dataclass(frozen=True)
class Divergence:
    """An f-divergence, whose name determines the score f'(t) of a ratio t.

        reverse_kl        f'(t) = log t
        forward_kl        f'(t) = 1 - 1 / t
        js_divergence     f'(t) = log(2 t / (t + 1))
        alpha_divergence  f'(t) = (t^(a - 1) - 1) / (a - 1)

    `coef` is a, in [0, 1): 0 is forward KL, and 1 would be reverse KL. This is TRL's meaning;
    the paper's alpha is 1 - a.
    """

    name: str
    coef: float

    def scores(self, ratios: mx.array) -> mx.array:
        """Return the score f'(t) for each log-ratio log t, in nats. (B,) -> (B,)"""
        if self.name == "reverse_kl":
            return ratios
        if self.name == "js_divergence":
            return math.log(2) + nn.log_sigmoid(ratios)
        power = self.coef - 1 if self.name == "alpha_divergence" else -1.0
        return _expm1(power * ratios) / power


def _expm1(x: mx.array) -> mx.array:
    """Return e^x - 1; above `LARGEST_EXPONENT` return its tangent, which does not overflow."""
    excess = nn.relu(x - LARGEST_EXPONENT)
    return mx.expm1(mx.minimum(x, LARGEST_EXPONENT)) + math.exp(LARGEST_EXPONENT) * excess
