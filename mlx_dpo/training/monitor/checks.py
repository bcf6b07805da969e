"""Checks of the metrics of training steps; each returns a warning or nothing.

Metrics are averaged over windows of steps, so that a single batch has little effect.
"""

from collections.abc import Callable, Sequence
from math import ceil
from statistics import median

from mlx_dpo.training.monitor.metrics import MIN_WINDOW, MonitoredRun, Row, mean, span

MIN_STEPS = 3  # fewest steps to judge by: the margins of the first step are zero
# Learning shows within so many steps after the warm-up, or this share of all steps if larger.
SETTLE_STEPS, SETTLE_SHARE = 20, 0.1
MIN_MARGIN = 0.1  # nats per pair; less after a tenth of the run stays below 1 to its end
SATURATED_ACCURACY = 0.99  # nearly perfect
MIN_PAIRS = 64  # fewest pairs for an accuracy or a correlation that is not noise
EARLY_SHARE = 0.05  # share of the run's steps that counts as early
CLIPPED_SHARE = 0.95
CLIPPED_FACTOR = 3.0  # median norm by bound; norms nearer to the bound keep their differences
MIN_LENGTH_CORRELATION = 0.5  # lengths then explain a quarter of the variance of the margins
MIN_LENGTH_MARGIN = 0.1  # correlations of smaller margins are noise
MAX_LOSS_NATS = 1.0  # nats of a chosen completion: e times less likely than under the reference
MAX_LOSS_PER_TOKEN = 0.02  # nats per token; for long completions, where 1 nat in total is little
MAX_DISTANCE_PER_TOKEN = 1.0  # nats; about the entropy of a chat model per token


MAX_DIVERGED_PER_TOKEN = 3.0  # nats that chosen completions lose; then nothing sensible is left
MIN_DIVERGED_PAIRS = 8  # fewest pairs, and fewest steps, from which a run counts as diverged
MIN_DIVERGED_STEPS = 2
DIVERGED_MARGIN = -1.0  # reward units: the loss of such a margin is twice that of no margin
NORMALIZED = "use a loss that divides by lengths (`sigmoid_norm`, `simpo`) or `ld_alpha`"
LENGTH_ACCURACY = 0.6  # of ranking pairs by length alone; below it lengths are balanced

# Takes facts about the run, its first row, and the rows of the last two windows of steps.
Check = Callable[[MonitoredRun, Row, Sequence[Row]], str | None]


def diverged(facts: MonitoredRun, first: Row, rows: Sequence[Row]) -> str | None:
    """Return a warning as soon as the run falls apart.

    In each of the last steps the loss is far above its start and the margin negative, or the margin
    is far below zero, or chosen completions are far less likely than under the reference.
    """
    recent = rows[-max(MIN_DIVERGED_STEPS, ceil(MIN_DIVERGED_PAIRS / facts.batch_size)) :]
    if len(recent) * facts.batch_size < MIN_DIVERGED_PAIRS or len(recent) < MIN_DIVERGED_STEPS:
        return None
    if not all(_is_diverged(facts, first, row) for row in recent):
        return None
    last = recent[-1]
    chosen = last.get("rewards/chosen")
    lost = ""
    if facts.referenced and chosen is not None and chosen < 0:
        nats = -chosen / facts.beta / facts.chosen_tokens
        lost = f", chosen completions {nats:.1f} nats per token less likely than before"
    return (
        f"{span(recent)}: the run has diverged (loss {last['loss']:.2f}, {first['loss']:.2f} at "
        f"step {int(first['step'])}{_accuracy(last)}{lost}): stop it "
        f"and use a smaller learning_rate than {facts.learning_rate:g}"
    )


def _accuracy(row: Row) -> str:
    accuracy = row.get("rewards/accuracies")
    return "" if accuracy is None else f"; accuracy {accuracy:.0%}"


def _is_diverged(facts: MonitoredRun, first: Row, row: Row) -> bool:
    margin, chosen = row.get("rewards/margins"), row.get("rewards/chosen")
    fails = row.get("rewards/accuracies", 0.0) < 0.5 and (margin is None or margin < 0)
    start = first["loss"]
    if fails and row["loss"] > start + max(1.0, abs(start)):
        return True
    if not facts.referenced or not facts.from_start:
        return False
    if fails and margin is not None and margin < DIVERGED_MARGIN:
        return True
    lost = 0.0 if chosen is None else -chosen / facts.beta / facts.chosen_tokens
    return lost > MAX_DIVERGED_PER_TOKEN


def not_learning(facts: MonitoredRun, first: Row, rows: Sequence[Row]) -> str | None:
    """Return a warning if the policy has hardly changed after the learning rate's maximum."""
    rest = max(SETTLE_STEPS, ceil(facts.total_steps * SETTLE_SHARE))
    when = min(facts.warmup_steps + rest, facts.total_steps)
    recent = rows[-MIN_WINDOW:]
    enough = max(MIN_STEPS, min(MIN_WINDOW, facts.total_steps))
    if not (facts.referenced and facts.from_start) or len(recent) < enough:
        return None
    if rows[-1]["step"] != when:
        return None
    # The margins of a step show the updates before it: those of the warm-up are small.
    recent = [row for row in recent if row["step"] > facts.warmup_steps + 1] or recent
    margin = mean(recent, "rewards/margins", size=abs)
    if margin is None or margin / facts.beta >= MIN_MARGIN:
        return None
    return (
        f"{span(recent)}: the loss stays at {mean(recent, 'loss'):.4f}, where it began "
        f"(margins of {margin:.1g} on average): the policy has hardly moved; use a larger "
        f"learning_rate than {facts.learning_rate:g}"
        + ", or more epochs"
        * (len(rows) < MIN_WINDOW)
    )


def saturated_accuracy(facts: MonitoredRun, first: Row, rows: Sequence[Row]) -> str | None:
    """Return a warning if nearly all pairs are ranked correctly early in training."""
    recent = rows[-max(MIN_WINDOW // 2, ceil(MIN_PAIRS / facts.batch_size)) :]
    accuracy = mean(recent, "rewards/accuracies")
    soon = rows[-1]["step"] <= ceil(facts.total_steps * EARLY_SHARE)
    enough = len(recent) * facts.batch_size >= MIN_PAIRS and len(recent) >= MIN_WINDOW // 2
    if not (soon and enough) or accuracy is None or accuracy < SATURATED_ACCURACY:
        return None
    return (
        f"{span(recent)}: accuracy is already {accuracy:.1%} after "
        f"{rows[-1]['step'] / facts.total_steps:.0%} of the steps: a simple feature separates "
        "chosen from rejected; check their lengths, their first words, and whether a model wrote "
        "only one of them"
    )


def likelihood_displacement(facts: MonitoredRun, first: Row, rows: Sequence[Row]) -> str | None:
    """Return a warning if chosen completions become less likely while the margin grows.

    Source: Razin et al. 2024, arXiv:2410.08847; Pal et al. 2024, arXiv:2402.13228 (DPOP).
    """
    before, recent = rows[: -facts.window], rows[-facts.window :]
    chosen, margin = mean(recent, "rewards/chosen"), mean(recent, "rewards/margins")
    earlier, less = mean(before, "rewards/chosen"), mean(before, "rewards/margins")
    if not facts.referenced or len(before) < facts.window:
        return None
    if chosen is None or margin is None or earlier is None or less is None:
        return None
    lost = -chosen / facts.beta
    falls = chosen < earlier and margin > max(0.0, less)
    if not falls or lost < max(MAX_LOSS_NATS, MAX_LOSS_PER_TOKEN * facts.chosen_tokens):
        return None
    return (
        f"{span(recent)}: chosen completions lose likelihood while the margin grows (log-ratio "
        f"{-lost:.1f} nats, {earlier / facts.beta:.1f} before; margin {margin:.2f}, {less:.2f} "
        "before); add `sft` to the losses, use loss_type `dpop`, a larger beta than "
        f"{facts.beta:g}, or a "
        f"smaller learning_rate than {facts.learning_rate:g}"
    )


def length_bias(facts: MonitoredRun, first: Row, rows: Sequence[Row]) -> str | None:
    """Return a warning if the margins of pairs correlate with the lengths of their completions."""
    recent = [row for row in rows[-facts.window :] if "length_correlation" in row]
    correlation = mean(recent, "length_correlation")
    margin = mean(recent, "rewards/margins", size=abs)
    if len(recent) < facts.window or len(recent) * facts.batch_size < MIN_PAIRS:
        return None
    if not facts.from_start or correlation is None or margin is None:
        return None
    if abs(correlation) < MIN_LENGTH_CORRELATION or margin < MIN_LENGTH_MARGIN:
        return None
    follows = (
        f"{span(recent)}: the margin follows the lengths of the completions (correlation "
        f"{correlation:+.2f} with how much longer chosen is)"
    )
    return f"{follows}: {_explain_lengths(facts, recent, correlation)}"


def _explain_lengths(facts: MonitoredRun, rows: Sequence[Row], correlation: float) -> str:
    """Return why margins follow lengths, and what helps.

    A log-ratio is a sum over tokens. If both completions lose likelihood in each token, the longer
    one loses more: that is likelihood displacement, and looks like a preference for length. Whether
    the pairs teach a length is seen from the pairs themselves.
    """
    longer = "longer" if correlation > 0 else "shorter"
    share = f"chosen is longer in {facts.chosen_longer:.1%} of the pairs"
    lean = facts.chosen_longer if correlation > 0 else 1 - facts.chosen_longer
    causes, remedies = [], []
    if (change := _shared_change(facts, rows, correlation)) is not None:
        what = "likelihood displacement" if correlation < 0 else "a gain of likelihood"
        causes.append(f"{change}; {what}, not by itself a preference for {longer} answers")
        remedies += (
            ["add `sft` to the losses (`loss_weights`)", "use loss_type `dpop`"]
            if correlation < 0
            else []
        )
        remedies += [
            f"use a larger beta than {facts.beta:g}",
            f"use a smaller learning_rate than {facts.learning_rate:g}",
        ]
    if lean >= LENGTH_ACCURACY:
        causes.append(f"{share}, so that the policy can learn to be {longer}")
        remedies += ["balance the lengths of the pairs", NORMALIZED]
    else:
        causes.append(f"{share}, so length alone does not separate chosen from rejected")
        remedies += [] if remedies else [NORMALIZED]
    return f"{'; '.join(causes)}; {', or '.join(remedies)}"


def _shared_change(facts: MonitoredRun, rows: Sequence[Row], correlation: float) -> str | None:
    """Return text if the log-ratios of both completions have the sign of the correlation."""
    chosen, rejected = mean(rows, "rewards/chosen"), mean(rows, "rewards/rejected")
    if not facts.referenced or chosen is None or rejected is None:
        return None
    per_token = [
        chosen / facts.beta / facts.chosen_tokens,
        rejected / facts.beta / (facts.rejected_tokens or facts.chosen_tokens),
    ]
    if not all(value * correlation > 0 for value in per_token):
        return None
    change = "gain" if correlation > 0 else "lose"
    return (
        f"chosen and rejected both {change} likelihood per token (chosen {per_token[0]:+.2f} nats, "
        f"rejected {per_token[1]:+.2f}), so long ones {change} more"
    )


def clipped_gradients(facts: MonitoredRun, first: Row, rows: Sequence[Row]) -> str | None:
    """Return a warning if nearly all gradients after the warm-up are strongly clipped."""
    recent = [row for row in rows[-facts.window :] if row["step"] > facts.warmup_steps]
    norms, bound = [row["grad_norm"] for row in recent], facts.max_grad_norm
    if len(recent) < facts.window or not bound:
        return None
    above = sum(norm > bound for norm in norms)
    if above < CLIPPED_SHARE * len(norms) or median(norms) < CLIPPED_FACTOR * bound:
        return None
    return (
        f"{span(recent)}: the gradient was clipped in {above} of {len(norms)} steps (median norm "
        f"{median(norms):.3g}, max_grad_norm {bound:g}): clipping makes all batches count "
        "equally; raise max_grad_norm"
    )


def far_from_reference(facts: MonitoredRun, first: Row, rows: Sequence[Row]) -> str | None:
    """Return a warning if the policy is far from the reference.

    The distance is the absolute mean log-ratio of the chosen completions, in nats per token. It
    is not an estimate of the KL divergence, because the texts are given, not sampled from the
    policy. Chosen completions are close to what the trained policy generates; rejected ones may
    become arbitrarily unlikely without harm.
    """
    recent = rows[-facts.window :]
    chosen = mean(recent, "rewards/chosen")
    if not facts.referenced or len(recent) < facts.window or chosen is None:
        return None
    away = chosen / facts.beta / facts.chosen_tokens
    if abs(away) < MAX_DISTANCE_PER_TOKEN:
        return None
    return (
        f"{span(recent)}: the policy is far from the reference (chosen completions are "
        f"{abs(away):.1f} nats per token {'more' if away > 0 else 'less'} likely): check its "
        f"answers; use a larger beta than {facts.beta:g}, a smaller learning_rate than "
        f"{facts.learning_rate:g}, or fewer steps"
    )


# In this order: a warning may make later ones needless.
CHECKS: dict[str, Check] = {
    "diverged": diverged,
    "far_away": far_from_reference,
    "unmoved": not_learning,
    "saturated": saturated_accuracy,
    "displaced": likelihood_displacement,
    "led_by_length": length_bias,
    "clipped": clipped_gradients,
}
