"""What is said of a set of pairs: outcomes per pair, their means, and the means' public names.

The names are those of TRL and of the reference implementation, so that curves of
different trainers can be laid over each other. Knows nothing of files or terminals.
"""

from collections.abc import Sequence

import mlx.core as mx

from mlx_dpo.types import PairLogps, PairOutcomes, PreferenceMetrics, StepMetrics

NAMES = {
    "loss": "loss",
    "chosen_rewards": "rewards/chosen",
    "rejected_rewards": "rewards/rejected",
    "margins": "rewards/margins",
    "accuracies": "rewards/accuracies",
    "chosen_logps": "logps/chosen",
    "rejected_logps": "logps/rejected",
}


def outcomes(
    losses: mx.array, policy: PairLogps, reference: PairLogps, *, beta: float
) -> PairOutcomes:
    """Losses and rewards of each pair; a reward is beta times the log-ratio. (B,) each"""
    return PairOutcomes(
        losses=losses,
        policy=policy,
        chosen_rewards=beta * (policy.chosen - reference.chosen),
        rejected_rewards=beta * (policy.rejected - reference.rejected),
    )


def concatenate(parts: Sequence[PairOutcomes]) -> PairOutcomes:
    """Outcomes of several micro-batches as those of one set of pairs."""

    def joined(arrays: list[mx.array]) -> mx.array:
        return mx.concatenate(arrays)

    return PairOutcomes(
        losses=joined([part.losses for part in parts]),
        policy=PairLogps(
            chosen=joined([part.policy.chosen for part in parts]),
            rejected=joined([part.policy.rejected for part in parts]),
        ),
        chosen_rewards=joined([part.chosen_rewards for part in parts]),
        rejected_rewards=joined([part.rejected_rewards for part in parts]),
    )


def summarise(of: PairOutcomes) -> PreferenceMetrics:
    """Means over the pairs. Accuracy counts pairs, and a tie counts as wrong."""
    margins = of.chosen_rewards - of.rejected_rewards
    means = mx.stack(
        [
            of.losses.mean(),
            of.chosen_rewards.mean(),
            of.rejected_rewards.mean(),
            margins.mean(),
            (of.chosen_rewards > of.rejected_rewards).astype(mx.float32).mean(),
            of.policy.chosen.mean(),
            of.policy.rejected.mean(),
        ]
    )
    return PreferenceMetrics(*means.tolist())  # type: ignore[misc]


def named(metrics: PreferenceMetrics, *, prefix: str = "") -> dict[str, float]:
    """The means under their public names; `eval_` is the prefix of held-out pairs."""
    return {prefix + NAMES[field]: value for field, value in metrics._asdict().items()}


def step_row(metrics: StepMetrics) -> dict[str, float]:
    """One optimizer step under public names, as a line of `metrics.jsonl`."""
    return {
        "step": metrics.step,
        "epoch": metrics.epoch,
        **named(metrics.preferences),
        "grad_norm": metrics.grad_norm,
        "learning_rate": metrics.learning_rate,
        "num_tokens": metrics.num_tokens,
        "padding_share": metrics.padding_share,
    }
