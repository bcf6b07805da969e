"""What is said of a set of pairs: outcomes per pair, their means, and the means' public names.

The names are those of TRL and of the reference implementation, so that curves of
different trainers can be laid over each other. Knows nothing of files or terminals.
"""

from collections.abc import Sequence
from typing import cast

import mlx.core as mx
from mlx.utils import tree_map

from mlx_dpo.io.arrays import scalar
from mlx_dpo.types import LossOutputs, PreferenceMetrics, StepMetrics

NAMES = {
    "loss": "loss",
    "chosen_rewards": "rewards/chosen",
    "rejected_rewards": "rewards/rejected",
    "margins": "rewards/margins",
    "accuracies": "rewards/accuracies",
    "chosen_logps": "logps/chosen",
    "rejected_logps": "logps/rejected",
    "chosen_tokens": "lengths/chosen",
    "rejected_tokens": "lengths/rejected",
    "kl": "kl",
    "length_correlation": "length_correlation",
}


def concatenate(parts: Sequence[LossOutputs]) -> LossOutputs:
    """Outcomes of several micro-batches as those of one set of pairs."""

    def joined(*arrays: mx.array) -> mx.array:
        return mx.concatenate(list(arrays)) if arrays[0].ndim else arrays[0]

    return cast(LossOutputs, tree_map(joined, parts[0], *parts[1:]))


def summarise(of: LossOutputs, *, labelled: bool = False) -> PreferenceMetrics:
    """Means over the pairs. Accuracy counts pairs, and a tie counts as wrong.

    Of `labelled` rows: means over the desirable and over the undesirable ones, as TRL takes
    them, None where there are none. Accuracy is the share of rows whose reward lies on the
    side of the reference point that their label says (TRL has none).
    """
    if labelled:
        return _summarise_labelled(of)
    margins, facts = of.chosen_rewards - of.rejected_rewards, of.scored.metadata
    means = mx.stack(
        [
            of.losses.mean(),
            of.chosen_rewards.mean(),
            of.rejected_rewards.mean(),
            margins.mean(),
            (of.chosen_rewards > of.rejected_rewards).astype(mx.float32).mean(),
            of.scored.policy.chosen.mean(),
            of.scored.policy.rejected.mean(),
            facts.chosen_tokens.mean(),
            facts.rejected_tokens.mean(),
        ]
    )
    correlation = _correlation(facts.chosen_tokens - facts.rejected_tokens, margins)
    return PreferenceMetrics(*means.tolist(), length_correlation=correlation)  # type: ignore[misc]


def _correlation(a: mx.array, b: mx.array) -> float | None:
    """Pearson's; None where one of the two does not vary."""
    a, b = a - a.mean(), b - b.mean()
    spread = scalar(mx.sqrt((a * a).sum()) * mx.sqrt((b * b).sum()))
    return scalar((a * b).sum()) / spread if spread > 0 else None


def _summarise_labelled(of: LossOutputs) -> PreferenceMetrics:
    rewards, logps = of.chosen_rewards, of.scored.policy.chosen
    good, tokens = of.scored.metadata.desirable, of.scored.metadata.chosen_tokens
    moved = mx.maximum(of.rejected_rewards.mean(), 0)  # beta times the estimate of the KL
    ratios = of.scored.policy.rejected - of.scored.reference.rejected
    right = mx.where(good, rewards > moved, rewards < moved).astype(mx.float32)
    desired, undesired = _mean(rewards, good), _mean(rewards, ~good)
    return PreferenceMetrics(
        loss=scalar(of.losses.mean()),
        chosen_rewards=desired,
        rejected_rewards=undesired,
        margins=None if desired is None or undesired is None else desired - undesired,
        accuracies=scalar(right.mean()),
        chosen_logps=_mean(logps, good),
        rejected_logps=_mean(logps, ~good),
        chosen_tokens=_mean(tokens, good),
        rejected_tokens=_mean(tokens, ~good),
        kl=max(0.0, scalar(ratios.mean())),
    )


def _mean(values: mx.array, where: mx.array) -> float | None:
    """The mean of those that are wanted, None if there are none."""
    count = scalar(where.sum())
    return scalar(mx.where(where, values, 0.0).sum()) / count if count else None


def named(metrics: PreferenceMetrics, *, prefix: str = "") -> dict[str, float]:
    """The means there are, under public names; `eval_` is the prefix of held-out pairs."""
    given = {field: value for field, value in metrics._asdict().items() if value is not None}
    return {prefix + NAMES[field]: value for field, value in given.items()}


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
