"""Training monitor: warn about problems of a run, judged by its metrics.

Each kind of warning is given once. The warnings depend on nothing but the metrics rows. A resumed
run passes its earlier rows to the monitor again, so no warning is repeated. Metrics are averaged
over windows of steps, so that a single batch has little effect.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from statistics import fmean, median

Row = Mapping[str, float]

MIN_WINDOW, MAX_WINDOW = 10, 50  # steps in a window: fewer are noise, more warn too late
MIN_STEPS = 3  # fewest steps to judge by: the margins of the first step are zero
# Learning shows within so many steps after the warm-up, or this share of all steps if larger.
SETTLE_STEPS, SETTLE_SHARE = 20, 0.1
MIN_MARGIN = 0.01  # a smaller margin after a tenth of the run stays below 0.1 to its end
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


@dataclass(frozen=True, kw_only=True)
class MonitoredRun:
    """Settings and statistics of a run that are needed to interpret its metrics."""

    total_steps: int
    warmup_steps: int
    batch_size: int
    beta: float
    learning_rate: float
    max_grad_norm: float
    chosen_tokens: float  # mean length of a chosen completion
    referenced: bool = True  # whether rewards are beta times log-ratios to the initial policy
    from_start: bool = True  # whether rewards were zero, or alike, before the first step

    @property
    def window(self) -> int:
        """Number of steps over which the monitor averages metrics."""
        return min(MAX_WINDOW, max(MIN_WINDOW, self.total_steps // 10))


Check = Callable[[MonitoredRun, Sequence[Row]], str | None]


class Monitor:
    """Checks the metrics of a run, row by row, and returns each kind of warning once."""

    def __init__(self, facts: MonitoredRun) -> None:
        """Create the monitor of a run, with no metrics rows yet.

        Args:
            facts: settings and statistics of the run that are needed to interpret its metrics.
        """
        self._facts = facts
        self._rows: list[Row] = []  # the last two windows
        self._warned: set[str] = set()

    def update(self, row: Row) -> list[str]:
        """Add a metrics row and return the new warnings; rows of evaluations are ignored."""
        if "loss" not in row:
            return []
        self._rows = [*self._rows, row][-2 * self._facts.window :]
        warnings = []
        for kind, check in CHECKS.items():
            if kind not in self._warned and (sentence := check(self._facts, self._rows)):
                self._warned.add(kind)
                warnings.append(sentence)
        return warnings


def not_learning(facts: MonitoredRun, rows: Sequence[Row]) -> str | None:
    """Return a warning if the policy has hardly changed after the learning rate's maximum."""
    rest = max(SETTLE_STEPS, ceil(facts.total_steps * SETTLE_SHARE))
    when = min(facts.warmup_steps + rest, facts.total_steps)
    recent = rows[-MIN_WINDOW:]
    margin = _mean(recent, "rewards/margins", size=abs)
    enough = max(MIN_STEPS, min(MIN_WINDOW, facts.total_steps))
    if not (facts.referenced and facts.from_start) or len(recent) < enough:
        return None
    if rows[-1]["step"] != when:
        return None
    if margin is None or margin >= MIN_MARGIN:
        return None
    return (
        f"{_span(recent)}: the loss stays at {_mean(recent, 'loss'):.4f}, where it began "
        f"(margins of {margin:.1g} on average): the policy has hardly moved; use a larger "
        f"learning_rate than {facts.learning_rate:g}"
        + ", or more epochs"
        * (len(rows) < MIN_WINDOW)
    )


def saturated_accuracy(facts: MonitoredRun, rows: Sequence[Row]) -> str | None:
    """Return a warning if nearly all pairs are ranked correctly early in training."""
    recent = rows[-max(MIN_WINDOW // 2, ceil(MIN_PAIRS / facts.batch_size)) :]
    accuracy = _mean(recent, "rewards/accuracies")
    soon = rows[-1]["step"] <= ceil(facts.total_steps * EARLY_SHARE)
    enough = len(recent) * facts.batch_size >= MIN_PAIRS and len(recent) >= MIN_WINDOW // 2
    if not (soon and enough) or accuracy is None or accuracy < SATURATED_ACCURACY:
        return None
    return (
        f"{_span(recent)}: {accuracy:.1%} of the pairs are right already, after "
        f"{rows[-1]['step'] / facts.total_steps:.0%} of the steps: something simple tells chosen "
        "from rejected; look at their lengths, their first words, and whether one kind of text "
        "was written by a model and the other not"
    )


def likelihood_displacement(facts: MonitoredRun, rows: Sequence[Row]) -> str | None:
    """Return a warning if chosen completions become less likely while the margin grows.

    Source: Razin et al. 2024, arXiv:2410.08847; Pal et al. 2024, arXiv:2402.13228 (DPOP).
    """
    before, recent = rows[: -facts.window], rows[-facts.window :]
    chosen, margin = _mean(recent, "rewards/chosen"), _mean(recent, "rewards/margins")
    earlier, less = _mean(before, "rewards/chosen"), _mean(before, "rewards/margins")
    if not facts.referenced or len(before) < facts.window:
        return None
    if chosen is None or margin is None or earlier is None or less is None:
        return None
    lost = -chosen / facts.beta
    falls = chosen < earlier and margin > max(0.0, less)
    if not falls or lost < max(MAX_LOSS_NATS, MAX_LOSS_PER_TOKEN * facts.chosen_tokens):
        return None
    return (
        f"{_span(recent)}: chosen completions lose likelihood while the margin grows (log-ratio "
        f"{-lost:.1f} nats, {earlier / facts.beta:.1f} before; margin {margin:.2f}, {less:.2f} "
        f"before); mix in `sft`, use loss_type `dpop`, a larger beta than {facts.beta:g}, or a "
        f"smaller learning_rate than {facts.learning_rate:g}"
    )


def length_bias(facts: MonitoredRun, rows: Sequence[Row]) -> str | None:
    """Return a warning if the margins of pairs correlate with the lengths of their completions."""
    recent = [row for row in rows[-facts.window :] if "length_correlation" in row]
    correlation = _mean(recent, "length_correlation")
    margin = _mean(recent, "rewards/margins", size=abs)
    if len(recent) < facts.window or len(recent) * facts.batch_size < MIN_PAIRS:
        return None
    if not facts.from_start or correlation is None or margin is None:
        return None
    if abs(correlation) < MIN_LENGTH_CORRELATION or margin < MIN_LENGTH_MARGIN:
        return None
    longer = "longer" if correlation > 0 else "shorter"
    return (
        f"{_span(recent)}: lengths drive the margin (correlation {correlation:+.2f} with how "
        f"much longer chosen is than rejected): the policy learns to be {longer}; balance the "
        "lengths of the pairs, or use a loss that divides by them (`sigmoid_norm`, `simpo`) or "
        "`ld_alpha`"
    )


def clipped_gradients(facts: MonitoredRun, rows: Sequence[Row]) -> str | None:
    """Return a warning if nearly all gradients after the warm-up are strongly clipped."""
    recent = [row for row in rows[-facts.window :] if row["step"] > facts.warmup_steps]
    norms, bound = [row["grad_norm"] for row in recent], facts.max_grad_norm
    if len(recent) < facts.window or not bound:
        return None
    above = sum(norm > bound for norm in norms)
    if above < CLIPPED_SHARE * len(norms) or median(norms) < CLIPPED_FACTOR * bound:
        return None
    return (
        f"{_span(recent)}: the gradient was clipped in {above} of {len(norms)} steps (median of "
        f"its norm {median(norms):.3g}, bound {bound:g}): batches count alike, clear or not; use "
        f"a larger max_grad_norm"
    )


def far_from_reference(facts: MonitoredRun, rows: Sequence[Row]) -> str | None:
    """Return a warning if the policy is far from the reference.

    The distance is the absolute mean log-ratio of the chosen completions, in nats per token. It
    is not an estimate of the KL divergence, because the texts are given, not sampled from the
    policy. Chosen completions are close to what the trained policy generates; rejected ones may
    become arbitrarily unlikely without harm.
    """
    recent = rows[-facts.window :]
    chosen = _mean(recent, "rewards/chosen")
    if not facts.referenced or len(recent) < facts.window or chosen is None:
        return None
    away = chosen / facts.beta / facts.chosen_tokens
    if abs(away) < MAX_DISTANCE_PER_TOKEN:
        return None
    return (
        f"{_span(recent)}: the policy runs away from the reference (chosen completions are "
        f"{abs(away):.1f} nats per token {'more' if away > 0 else 'less'} likely): look at what it "
        f"says now; use a larger beta than {facts.beta:g}, a smaller learning_rate than "
        f"{facts.learning_rate:g}, or fewer steps"
    )


CHECKS: dict[str, Check] = {
    "unmoved": not_learning,
    "saturated": saturated_accuracy,
    "displaced": likelihood_displacement,
    "led_by_length": length_bias,
    "clipped": clipped_gradients,
    "far_away": far_from_reference,
}


def _mean(rows: Sequence[Row], name: str, size: Callable[[float], float] = float) -> float | None:
    """Return the mean of the metric `name` over the rows that have it; None if no row has it.

    The function `size`, such as `abs`, is applied to each value before averaging.
    """
    values = [size(row[name]) for row in rows if name in row]
    return fmean(values) if values else None


def _span(rows: Sequence[Row]) -> str:
    return f"steps {int(rows[0]['step'])} to {int(rows[-1]['step'])}"
