"""Verdict on a trained policy: whether its margins mean anything, and whether it became worse."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_dpo.losses.metrics import EVAL_PREFIX
from mlx_dpo.training.monitor.checks import MAX_DISTANCE_PER_TOKEN, MIN_MARGIN
from mlx_dpo.training.monitor.metrics import MonitoredRun, Row
from mlx_dpo.training.monitor.samples import degenerate_answers
from mlx_dpo.units import format_items

UNCHANGED, UNCLEAR, WORSE, FAR = "unchanged", "unclear", "worse", "far"
DEGENERATE = "degenerate"

MAX_DRIFT = 1.0  # nats per completion; a policy that drifted less has hardly changed
ERRORS = 2.0  # a mean within so many standard errors of zero is noise
MIN_START = 0.005  # margins before training that are not shown as zero
RATE_FACTOR = 10  # a learning rate to try next is so many times as large
FEW_STEPS = 100
SINGLE_PAIR = (
    "a single held-out pair shows nothing, so accuracy is noise; hold out more pairs "
    "(`valid_fraction`), or use more pairs"
)


@dataclass(frozen=True)
class Verdict:
    """A finding about a trained policy, with its numbers and what to change."""

    kind: str  # UNCHANGED, UNCLEAR, WORSE, FAR or DEGENERATE
    text: str

    @property
    def is_noise(self) -> bool:
        """Whether the margins are noise, so that accuracy is no result."""
        return self.kind in (UNCHANGED, UNCLEAR)

    @property
    def is_worse(self) -> bool:
        """Whether the policy is worse than the model it was trained from."""
        return self.kind in (WORSE, FAR, DEGENERATE)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Verdict | None":
        """Return the verdict in a run record (content of `run.json`); None if there is none."""
        stored = record.get("verdict")
        return None if stored is None else cls(stored["kind"], stored["text"])

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as values for JSON."""
        return {"kind": self.kind, "text": self.text}


def describe_result(
    verdict: Verdict | None, evaluation: Row | None, pairs: str, before: Row | None = None
) -> str:
    """Return the result of a run as a sentence for its end, for `eval`, its report and its card.

    Rewards that are no log-ratios prefer some completions before training already. Their values
    before training are named.

    Args:
        verdict: what is wrong with the policy; None if nothing is.
        evaluation: metrics of the policy on the pairs, with or without the prefix `eval_`.
        pairs: how many pairs these are, and which, such as `50 held-out pairs`.
        before: metrics of the policy on the same pairs before training, if they are known.
    """
    if verdict is not None:
        return verdict.text
    if evaluation is None:
        return "no pairs were held out, so nothing was measured on unseen pairs"
    metrics = {name.removeprefix(EVAL_PREFIX): value for name, value in evaluation.items()}
    margin, accuracy = metrics.get("rewards/margins"), metrics.get("rewards/accuracies")
    if margin is None or accuracy is None:
        return f"the loss on {pairs} is {_describe_loss(metrics, before or {})}"
    prefers = "prefers" if margin > 0 and accuracy > 0.5 else "does not prefer"
    return (
        f"the policy {prefers} the chosen completions: {accuracy:.1%} of {pairs} are ranked "
        f"correctly, with a margin of {margin:+.2f}{_describe_start(before or {})}"
    )


def _describe_loss(metrics: Row, before: Row) -> str:
    """Return the loss and the token accuracy, if there is one, with those before training."""
    text, start = f"{metrics['loss']:.4f}", before.get(f"{EVAL_PREFIX}loss")
    text += "" if start is None else f" ({start:.4f} before training)"
    if (accuracy := metrics.get("mean_token_accuracy")) is None:
        return text
    start = before.get(f"{EVAL_PREFIX}mean_token_accuracy")
    text += f", and the policy ranks {accuracy:.1%} of their tokens first"
    return text + ("" if start is None else f" ({start:.1%} before training)")


def _describe_start(before: Row) -> str:
    """Return accuracy and margin before training as text; "" if there was no preference."""
    metrics = {name.removeprefix(EVAL_PREFIX): value for name, value in before.items()}
    margin, accuracy = metrics.get("rewards/margins", 0.0), metrics.get("rewards/accuracies")
    if accuracy is None or abs(margin) < MIN_START:
        return ""
    return f"; before training {accuracy:.1%}, with a margin of {margin:+.2f}"


def judge_policy(
    facts: MonitoredRun, metrics: Row, *, is_single_pair: bool = False
) -> Verdict | None:
    """Return the verdict on a policy from its metrics; None if nothing is wrong.

    Pairs are judged if rewards are beta times log-ratios. Their margin is noise if it is less than
    a tenth of a nat per pair, or less than two standard errors of its mean. One pair has no
    standard error and shows nothing.

    Args:
        facts: settings of the run.
        metrics: means over held-out pairs, or over the last steps, by name without a prefix.
        is_single_pair: whether the metrics are those of a single held-out pair.
    """
    found = _judge_pairs(facts, metrics) or _judge_answers(facts, metrics)
    if found is None and is_single_pair and "rewards/margins" in metrics:
        return Verdict(UNCLEAR, SINGLE_PAIR)
    return found


def _judge_answers(facts: MonitoredRun, metrics: Row) -> Verdict | None:
    """Return a verdict on the sampled answers; None if there are none, or nothing is wrong."""
    if (fault := degenerate_answers(metrics)) is None:
        return None
    return Verdict(
        DEGENERATE,
        f"the policy is worse than the base model, whatever its accuracy: {fault}; train again "
        f"with {facts.gentler}",
    )


def _judge_pairs(facts: MonitoredRun, metrics: Row) -> Verdict | None:
    margin, chosen = metrics.get("rewards/margins"), metrics.get("rewards/chosen")
    if not facts.referenced or not facts.from_start or margin is None or chosen is None:
        return None
    nats = margin / facts.beta
    lost = -chosen / facts.beta / metrics["lengths/chosen"]
    error = metrics.get("rewards/margins_stderr", 0.0) * ERRORS
    accuracy = metrics["rewards/accuracies"]
    if lost > MAX_DISTANCE_PER_TOKEN:
        return Verdict(FAR, _far_text(facts, lost, accuracy))
    if nats < -MIN_MARGIN and margin < -error and accuracy < 0.5:
        return Verdict(WORSE, _worse_text(facts, margin, accuracy))
    if abs(nats) < MIN_MARGIN and _drift(facts, metrics) < MAX_DRIFT:
        return Verdict(UNCHANGED, _unchanged_text(facts, nats))
    if abs(nats) < MIN_MARGIN or abs(margin) < error:
        return Verdict(UNCLEAR, _unclear_text(margin, error))
    return None


def _drift(facts: MonitoredRun, metrics: Row) -> float:
    """Return the larger of the mean log-ratios of chosen and of rejected completions, in nats."""
    rewards = [metrics.get(f"rewards/{name}", 0.0) for name in ("chosen", "rejected")]
    return max(map(abs, rewards)) / facts.beta


def _far_text(facts: MonitoredRun, lost: float, accuracy: float) -> str:
    return (
        f"the policy is worse than the base model: chosen completions are {lost:.1f} nats per "
        f"token less likely than before training (accuracy {accuracy:.1%}), so that its answers "
        f"are probably broken; train again with a smaller learning_rate than "
        f"{facts.learning_rate:g}, or a larger beta than {facts.beta:g}"
    )


def _worse_text(facts: MonitoredRun, margin: float, accuracy: float) -> str:
    return (
        f"the policy is worse than the base model: it prefers the rejected completions (accuracy "
        f"{accuracy:.1%}, margin {margin:+.2f}); train again with a smaller learning_rate than "
        f"{facts.learning_rate:g}, and check that chosen and rejected are not swapped"
    )


def _unchanged_text(facts: MonitoredRun, nats: float) -> str:
    steps = facts.total_steps
    few = f"use more pairs or more `epochs` (this run took {format_items(steps, 'steps')}), or "
    few = few if steps < FEW_STEPS else "use "
    return (
        f"the policy has hardly changed: the log-ratio margin is {nats:+.1g} nats per pair, so "
        f"accuracy is noise; {few}a larger learning_rate than {facts.learning_rate:g}, such as "
        f"{RATE_FACTOR * facts.learning_rate:.2g}"
    )


def _unclear_text(margin: float, error: float) -> str:
    within = f", within two standard errors (±{error:.2g}) of zero" if abs(margin) < error else ""
    return (
        f"the pairs do not show a preference: the margin is {margin:+.2g}{within}, so accuracy is "
        "noise; train longer or with a larger learning_rate, or use more pairs"
    )
