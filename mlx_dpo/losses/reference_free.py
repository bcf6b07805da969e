"""Reference-free losses: functions of the policy's log-probabilities only."""

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.losses.loss import BETA, Loss
from mlx_dpo.losses.pairwise import Offset, sigmoid_loss
from mlx_dpo.types import PairLogps

# Average log-probabilities are clipped here: the odds of a certain completion are infinite.
LARGEST_LOGP = -1e-6


def sft_loss(chosen: mx.array, mean_tokens: mx.array) -> mx.array:
    """Return the cross-entropy of the chosen completions. (B,), () -> (B,)

    Each negative log-probability is divided by `mean_tokens`, the mean number of tokens of the
    chosen completions of a step. The mean over pairs is then the mean over tokens, as in TRL.

    Source: part of RPO in Pang et al. 2024, arXiv:2404.19733, who divide by the completion's own
    length; this function follows TRL's mean over tokens.
    """
    return -chosen / mean_tokens


def simpo_loss(
    margin: mx.array, *, beta: float, simpo_gamma: float, label_smoothing: float = 0.0,
    offset: Offset = 0.0,
) -> mx.array:  # fmt: skip
    """Return the SimPO loss: `sigmoid_loss` of beta m - gamma - offset. (B,) -> (B,)

    Args:
        margin: m, the margin of log-probabilities averaged over each completion's tokens.
        beta: Scale of the reward; there is no KL constraint.
        simpo_gamma: gamma, the target reward margin. It is not multiplied by beta: the
            authors' code and TRL have beta (m - gamma / beta), which is the same.
        label_smoothing: Assumed share of flipped labels; TRL has it, the paper does not.
        offset: Target reward margin in addition to gamma. (B,)

    Source: Meng et al. 2024, arXiv:2405.14734, Eq. 6.
    """
    target = simpo_gamma + offset
    return sigmoid_loss(margin, beta=beta, label_smoothing=label_smoothing, offset=target)


def cpo_loss(
    logps: PairLogps, mean_tokens: mx.array, *, beta: float, cpo_alpha: float,
    label_smoothing: float = 0.0, offset: Offset = 0.0,
) -> mx.array:  # fmt: skip
    """Return the CPO loss: `sigmoid_loss` without a reference, plus `sft_loss`. (B,)

        loss = sigmoid_loss(logπ(w) - logπ(l)) + alpha sft_loss(w)

    where w is the chosen and l the rejected completion.

    The paper sums the likelihood over a completion; the authors' code, TRL and this function
    take the mean over tokens.

    Source: Xu et al. 2024, arXiv:2401.08417, Eq. 3.
    """
    margin = logps.chosen - logps.rejected
    preference = sigmoid_loss(margin, beta=beta, label_smoothing=label_smoothing, offset=offset)
    return preference + cpo_alpha * sft_loss(logps.chosen, mean_tokens)


def orpo_loss(
    logps: PairLogps, chosen_tokens: mx.array, rejected_tokens: mx.array,
    mean_tokens: mx.array, *, beta: float,
) -> mx.array:  # fmt: skip
    """Return the ORPO loss: `sft_loss` plus the odds-ratio loss. (B,)

        loss = sft_loss(w) - beta log sigmoid(log odds(w) - log odds(l))

    where w is chosen and l rejected, with the odds p / (1 - p) of p = exp(logπ(y) / |y|).
    In TRL the likelihood includes the prompt. This function follows the paper and takes that of
    the completion only.

    Source: Hong et al. 2024, arXiv:2403.07691, Eqs. 6 and 7; beta is its lambda.
    """
    chosen = _log_odds(logps.chosen / chosen_tokens)
    rejected = _log_odds(logps.rejected / rejected_tokens)
    return sft_loss(logps.chosen, mean_tokens) - beta * nn.log_sigmoid(chosen - rejected)


def _log_odds(logp: mx.array) -> mx.array:
    logp = mx.minimum(logp, LARGEST_LOGP)
    return logp - mx.log(-mx.expm1(logp))


LOSSES = (
    Loss(
        name="sft",
        function=lambda pairs, s: sft_loss(pairs.policy.chosen, pairs.metadata.mean_chosen_tokens),
        equation="−logπ(w) / mean |w| of the step: the mean cross-entropy per token",
        source="maximum likelihood; as a part of RPO: Pang et al. 2024, arXiv:2404.19733",
        use="Alone: instruction tuning, on rows with one answer or on the chosen answer of pairs. "
        "Added to another loss: the likelihood of chosen does not decrease.",
        defaults={},
        reward=None,
        needs_reference=False,
    ),
    Loss(
        name="simpo",
        function=lambda pairs, s: simpo_loss(
            pairs.policy_margin_per_token,
            beta=s.beta,
            simpo_gamma=s.simpo_gamma,
            label_smoothing=s.label_smoothing,
            offset=pairs.offset,
        ),
        equation="−log σ(β (logπ(w)/|w| − logπ(l)/|l|) − γ)",
        source="SimPO: Meng et al. 2024, arXiv:2405.14734, Eq. 6",
        use="No reference, and no reward for length; γ is `simpo_gamma`.",
        defaults={"beta": 2.0, "simpo_gamma": 0.5, "label_smoothing": 0.0},
        reward="average log-probability",
        needs_reference=False,
        uses_margins=True,
    ),
    Loss(
        name="cpo",
        function=lambda pairs, s: cpo_loss(
            pairs.policy,
            pairs.metadata.mean_chosen_tokens,
            beta=s.beta,
            cpo_alpha=s.cpo_alpha,
            label_smoothing=s.label_smoothing,
            offset=pairs.offset,
        ),
        equation="−log σ(β (logπ(w) − logπ(l))), plus α times sft",
        source="CPO: Xu et al. 2024, arXiv:2401.08417, Eq. 3",
        use="No reference; first used for translation; α is `cpo_alpha`.",
        defaults=BETA | {"cpo_alpha": 1.0, "label_smoothing": 0.0},
        reward="log-probability",
        needs_reference=False,
        uses_margins=True,
    ),
    Loss(
        name="orpo",
        function=lambda pairs, s: orpo_loss(
            pairs.policy,
            pairs.metadata.chosen_tokens,
            pairs.metadata.rejected_tokens,
            pairs.metadata.mean_chosen_tokens,
            beta=s.beta,
        ),
        equation="sft − β log σ(log odds(w) − log odds(l)), odds of exp(logπ(y)/|y|)",
        source="ORPO: Hong et al. 2024, arXiv:2403.07691, Eqs. 6 and 7",
        use="Training a base model in one stage, without supervised fine-tuning before.",
        defaults=BETA,
        reward="average log-probability",
        needs_reference=False,
    ),
)
