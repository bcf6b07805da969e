"""Losses of the policy's log-probabilities alone; one loss per pair out."""

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.losses.pairwise import sigmoid_loss
from mlx_dpo.types import PairLogps

# An average log-probability above this counts as this: at certainty, odds are infinite.
NEARLY_CERTAIN = -1e-6


def sft_loss(chosen: mx.array, mean_tokens: mx.array) -> mx.array:
    """Cross-entropy of the chosen completions. (B,), () -> (B,)

    Divided by the mean length over the step, not by each own: the mean over pairs is then that
    over tokens, as TRL and PyTorch have it.

    Source: as a part of RPO in Pang et al. 2024, arXiv:2404.19733, who divide each by its own
    length; TRL's mean over tokens is followed.
    """
    return -chosen / mean_tokens


def simpo_loss(
    margin: mx.array, *, beta: float, simpo_gamma: float, label_smoothing: float = 0.0,
    more: mx.array | float = 0.0,
) -> mx.array:  # fmt: skip
    """`sigmoid_loss` of beta m - gamma - more. (B,) -> (B,)

    Args:
        margin: Of log-probabilities averaged over the tokens of each completion.
        beta: Scale of the reward; no pull to anything.
        simpo_gamma: What the reward of chosen is to be ahead by. It is not multiplied by beta:
            the authors' code and TRL have gamma / beta inside, which is the same.
        label_smoothing: Share of labels taken to be flipped; TRL has it, the paper does not.
        more: Wanted beyond gamma. (B,)

    Source: Meng et al. 2024, arXiv:2405.14734, Eq. 6.
    """
    return sigmoid_loss(margin, beta=beta, label_smoothing=label_smoothing, more=simpo_gamma + more)


def cpo_loss(
    logps: PairLogps, mean_tokens: mx.array, *, beta: float, cpo_alpha: float,
    label_smoothing: float = 0.0, more: mx.array | float = 0.0,
) -> mx.array:  # fmt: skip
    """`sigmoid_loss` of the policy's own margin, and the likelihood of chosen. (B,)

        loss = sigmoid_loss(logπ(w) - logπ(l)) + alpha sft_loss(w)

    The paper's likelihood is of whole completions; the authors' code and TRL take the mean over
    tokens, which is followed.

    Source: Xu et al. 2024, arXiv:2401.08417, Eq. 3.
    """
    margin = logps.chosen - logps.rejected
    preference = sigmoid_loss(margin, beta=beta, label_smoothing=label_smoothing, more=more)
    return preference + cpo_alpha * sft_loss(logps.chosen, mean_tokens)


def orpo_loss(
    logps: PairLogps, chosen_tokens: mx.array, rejected_tokens: mx.array,
    mean_tokens: mx.array, *, beta: float,
) -> mx.array:  # fmt: skip
    """Likelihood of chosen, and the ratio of odds. (B,)

        loss = sft_loss(w) - beta log sigmoid(log odds(w) - log odds(l))

    with the odds p / (1 - p) of p = exp(logπ(y) / |y|). TRL's likelihood is of the prompt, too;
    the paper's, which is followed, of the completion alone.

    Source: Hong et al. 2024, arXiv:2403.07691, Eqs. 6 and 7; beta is its lambda.
    """
    ahead = _log_odds(logps.chosen / chosen_tokens) - _log_odds(logps.rejected / rejected_tokens)
    return sft_loss(logps.chosen, mean_tokens) - beta * nn.log_sigmoid(ahead)


def _log_odds(logp: mx.array) -> mx.array:
    logp = mx.minimum(logp, NEARLY_CERTAIN)
    return logp - mx.log(-mx.expm1(logp))
