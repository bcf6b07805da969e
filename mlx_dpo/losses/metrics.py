"""Metrics of preference pairs: their computation, names, labels and directions.

The public names are those of TRL and of the reference implementation of DPO, so that curves of
different trainers can be overlaid. `METRICS` is the only place that lists metrics; the trackers,
the console, the curves, the model card and early stopping read it.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, cast

import mlx.core as mx
from mlx.utils import tree_map

from mlx_dpo.io.arrays import scalar
from mlx_dpo.types import LossOutputs, PreferenceMetrics, StepMetrics


class Metric(NamedTuple):
    """A metric: its public name, its display label, and which direction is better."""

    name: str
    label: str
    better: Literal["lower", "higher"] | None = None  # None: neither direction is better


# By the field of `PreferenceMetrics`, in the order in which printed tables list the metrics.
METRICS: Mapping[str, Metric] = {
    "loss": Metric("loss", "loss", "lower"),
    "accuracies": Metric("rewards/accuracies", "accuracy", "higher"),
    "margins": Metric("rewards/margins", "margin", "higher"),
    "best_worst_margins": Metric(
        "rewards/margins_best_worst", "margin of best and worst of a list", "higher"
    ),
    "mean_token_accuracy": Metric("mean_token_accuracy", "token accuracy", "higher"),
    "chosen_rewards": Metric("rewards/chosen", "reward of chosen", "higher"),
    "rejected_rewards": Metric("rewards/rejected", "reward of rejected", "lower"),
    "chosen_logps": Metric("logps/chosen", "log-prob of chosen", "higher"),
    "rejected_logps": Metric("logps/rejected", "log-prob of rejected", "lower"),
    "chosen_tokens": Metric("lengths/chosen", "tokens of chosen"),
    "rejected_tokens": Metric("lengths/rejected", "tokens of rejected"),
    "kl": Metric("kl", "KL divergence"),
    "length_correlation": Metric("length_correlation", "correlation of length and margin"),
    "margins_stderr": Metric("rewards/margins_stderr", "standard error of the margin"),
}
EVAL_PREFIX = "eval_"  # before the names of metrics on held-out pairs


def concatenate_outputs(parts: Sequence[LossOutputs]) -> LossOutputs:
    """Concatenate the loss outputs of several micro-batches along the axis of the pairs."""

    def concatenate(*arrays: mx.array) -> mx.array:
        return mx.concatenate(list(arrays)) if arrays[0].ndim else arrays[0]

    return cast(LossOutputs, tree_map(concatenate, parts[0], *parts[1:]))


def compute_metrics(
    outputs: LossOutputs, *, labelled: bool = False, supervised: bool = False
) -> PreferenceMetrics:
    """Return the metrics as means over all pairs; accuracy is the share with a positive margin.

    For ranked lists of more than one pair, the margin of best and worst is the mean over the pairs
    of a list's best and worst completion. It is None if there are no such pairs.

    With `labelled` (KTO), the metrics of chosen and rejected are means over the desirable and the
    undesirable examples, as in TRL, or None if there are no such examples. Accuracy is then the
    share of examples whose reward is above KTO's reference point if desirable and below it if
    not (TRL has no such metric).

    With `supervised` (SFT), there are no rewards. The token accuracy is the share of all scored
    tokens that the policy ranks first, as in TRL.
    """
    if supervised:
        return _compute_supervised_metrics(outputs)
    if labelled:
        return _compute_labelled_metrics(outputs)
    margins = outputs.chosen_rewards - outputs.rejected_rewards
    metadata, policy = outputs.scored.metadata, outputs.scored.policy
    means = {
        "loss": outputs.losses.mean(),
        "chosen_rewards": outputs.chosen_rewards.mean(),
        "rejected_rewards": outputs.rejected_rewards.mean(),
        "margins": margins.mean(),
        "accuracies": (outputs.chosen_rewards > outputs.rejected_rewards).astype(mx.float32).mean(),
        "chosen_logps": policy.chosen.mean(),
        "rejected_logps": policy.rejected.mean(),
        "chosen_tokens": metadata.chosen_tokens.mean(),
        "rejected_tokens": metadata.rejected_tokens.mean(),
    }
    # One transfer from the device for all means.
    values = cast(list[float], mx.stack(list(means.values())).tolist())
    best_worst = _masked_mean(margins, metadata.best_worst)
    has_lists = best_worst is not None
    length_differences = metadata.chosen_tokens - metadata.rejected_tokens
    return PreferenceMetrics(
        **dict(zip(means, values, strict=True)),
        length_correlation=_pearson_correlation(length_differences, margins),
        margins_stderr=_standard_error(margins, metadata.lists if has_lists else None),
        best_worst_margins=best_worst,
    )


def _standard_error(values: mx.array, lists: mx.array | None) -> float | None:
    """Return the standard error of the mean, or None for a single value or a single list.

    Pairs of one list share completions and are no independent values: with `lists`, the index of
    each value's list, the deviations of a list are added before they are squared.
    """
    count = values.size
    if lists is None:
        return scalar(mx.sqrt(values.var(ddof=1) / count)) if count > 1 else None
    deviations = mx.zeros((count,)).at[lists].add(values - values.mean())
    num_lists = len(set(cast(list[int], lists.tolist())))
    if num_lists == 1:
        return None
    factor = num_lists / (num_lists - 1)
    return scalar(mx.sqrt(factor * mx.square(deviations).sum())) / count


def _pearson_correlation(a: mx.array, b: mx.array) -> float | None:
    """Return Pearson's correlation, or None if one of the two is constant."""
    a, b = a - a.mean(), b - b.mean()
    spread = scalar(mx.sqrt((a * a).sum()) * mx.sqrt((b * b).sum()))
    return scalar((a * b).sum()) / spread if spread > 0 else None


def _compute_supervised_metrics(outputs: LossOutputs) -> PreferenceMetrics:
    policy, tokens = outputs.scored.policy, outputs.scored.metadata.chosen_tokens
    # `rejected` holds the number of tokens that the policy ranks first.
    hits = policy.rejected.sum() / tokens.sum()
    means = [outputs.losses.mean(), hits, policy.chosen.mean(), tokens.mean()]
    loss, accuracy, logps, length = cast(list[float], mx.stack(means).tolist())
    return PreferenceMetrics(
        loss=loss, chosen_logps=logps, chosen_tokens=length, mean_token_accuracy=accuracy
    )


def _compute_labelled_metrics(outputs: LossOutputs) -> PreferenceMetrics:
    scored, rewards, logps = outputs.scored, outputs.chosen_rewards, outputs.scored.policy.chosen
    desirable, tokens = scored.metadata.desirable, scored.metadata.chosen_tokens
    # `rejected` holds the mismatched completions, from which KTO estimates the KL divergence.
    reference_point = mx.maximum(outputs.rejected_rewards.mean(), 0)
    mismatched_ratios = scored.policy.rejected - scored.reference.rejected
    is_correct = mx.where(desirable, rewards > reference_point, rewards < reference_point)
    chosen, rejected = _masked_mean(rewards, desirable), _masked_mean(rewards, ~desirable)
    return PreferenceMetrics(
        loss=scalar(outputs.losses.mean()),
        chosen_rewards=chosen,
        rejected_rewards=rejected,
        margins=None if chosen is None or rejected is None else chosen - rejected,
        accuracies=scalar(is_correct.astype(mx.float32).mean()),
        chosen_logps=_masked_mean(logps, desirable),
        rejected_logps=_masked_mean(logps, ~desirable),
        chosen_tokens=_masked_mean(tokens, desirable),
        rejected_tokens=_masked_mean(tokens, ~desirable),
        kl=max(0.0, scalar(mismatched_ratios.mean())),
    )


def _masked_mean(values: mx.array, mask: mx.array) -> float | None:
    """Return the mean of the values where `mask` is True, or None if it is True nowhere."""
    count = scalar(mask.sum())
    return scalar(mx.where(mask, values, 0.0).sum()) / count if count else None


def to_public_names(metrics: PreferenceMetrics, *, prefix: str = "") -> dict[str, float]:
    """Return a dictionary from `prefix` + public name to metric, without those that are None."""
    values = {field: value for field, value in metrics._asdict().items() if value is not None}
    return {prefix + METRICS[field].name: value for field, value in values.items()}


def step_row(metrics: StepMetrics) -> dict[str, float]:
    """Return the row of `metrics.jsonl` for one optimizer step: metrics by public name."""
    return {
        "step": metrics.step,
        "epoch": metrics.epoch,
        **to_public_names(metrics.preferences),
        "grad_norm": metrics.grad_norm,
        "learning_rate": metrics.learning_rate,
        "num_tokens": metrics.num_tokens,
        "padding_share": metrics.padding_share,
    }
