"""What takes the place of a log-ratio where another divergence keeps the policy near.

Of the divergence with generator f, it is f'(t) of the ratio t = π(y) / π_ref(y). A term that
nobody can compute cancels in the difference of two completions of one prompt, and only there.
Source: Wang et al. 2023, arXiv:2309.16240. Constants are TRL's; they matter where scores are
divided by lengths.
"""

import math
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

# Beyond it exponentials go on as their tangent: float32 holds the square of every score, and
# completions that are out of reach are still pulled back. TRL's are cut at 80 (alpha), where
# their gradient is zero, or not at all (forward KL), and overflow at 88.
LARGEST_EXPONENT = 30.0


@dataclass(frozen=True)
class Divergence:
    """One of `settings.loss.DIVERGENCES`.

        reverse_kl        f'(t) = log t
        forward_kl        f'(t) = 1 - 1 / t
        js_divergence     f'(t) = log(2 t / (t + 1))
        alpha_divergence  f'(t) = (t^(a - 1) - 1) / (a - 1)

    `coef` is a, in [0, 1): 0 is forward KL, and 1 would be reverse KL. So it is in TRL; the
    paper's alpha is 1 - a.
    """

    name: str
    coef: float

    def scores(self, ratios: mx.array) -> mx.array:
        """f'(t) of log-ratios, log t in nats. (B,) -> (B,)"""
        if self.name == "reverse_kl":
            return ratios
        if self.name == "js_divergence":
            return math.log(2) + nn.log_sigmoid(ratios)
        power = self.coef - 1 if self.name == "alpha_divergence" else -1.0
        return _expm1(power * ratios) / power


def _expm1(x: mx.array) -> mx.array:
    """e^x - 1, and beyond the largest exponent its tangent."""
    beyond = nn.relu(x - LARGEST_EXPONENT)
    return mx.expm1(mx.minimum(x, LARGEST_EXPONENT)) + math.exp(LARGEST_EXPONENT) * beyond
