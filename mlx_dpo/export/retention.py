"""Measure how much of a run's training a written model retains, on preference pairs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_dpo.errors import ModelError
from mlx_dpo.models.load import LoadedModel
from mlx_dpo.phases import phase
from mlx_dpo.saved_runs.open import OpenRun, load_adapter_into, load_reference_into
from mlx_dpo.scoring.generation_match import use_generating_function
from mlx_dpo.scoring.score_pairs import score_pairs
from mlx_dpo.types import PairLogps, TokenizedPair, lack_rejected

Values = np.ndarray  # (n,) float64
SMALL_MARGIN = 0.01  # nats; rounding may be larger than such a margin


class RetentionError(ModelError):
    """A written model keeps too little, or too much, of the training."""


@dataclass(frozen=True)
class Retention:
    """How much of the training a fused model retains, measured on preference pairs."""

    pairs: int
    margin_before: float  # mean over pairs of the log-ratio margin, nats
    margin_after: float
    margin: float  # retained share of the margin
    change: float  # retained share of the change of the completions' log-probabilities
    mean_difference: float  # of log-probabilities, absolute, nats per token
    of_answers: bool = False  # instruction tuning: the margin is the log-ratio of single answers

    @property
    def minimum(self) -> float:
        """The smaller of the shares of margin and log-prob change that are left after fusing.

        If the margin of the policy is not positive, only `change` counts.
        """
        return min(self.margin, self.change) if self.margin_before > 0 else self.change

    @property
    def maximum(self) -> float:
        """The larger of these shares; if the policy's margin is not positive, that of `change`."""
        return max(self.margin, self.change) if self.margin_before > 0 else self.change


def measure_retention(
    pairs: Sequence[TokenizedPair], reference: PairLogps, policy: PairLogps, fused: PairLogps
) -> Retention:
    """Measure how much of the policy's change of log-probabilities the fused model retains.

    The fused model's change from the reference is projected on the policy's change. Noise averages
    out in this projection. If the policy's change is small, noise can still dominate, so that a
    share far above 1 is as bad as a share far below 1.

    Args:
        reference: Log-probabilities of the pairs under the reference model.
        policy: Log-probabilities of the pairs under the policy, before fusing.
        fused: Log-probabilities of the pairs under the fused model.
    """
    policy_ratios, fused_ratios = (
        _log_ratios(pairs, reference, policy),
        _log_ratios(pairs, reference, fused),
    )
    before, after = _margins(pairs, policy_ratios).mean(), _margins(pairs, fused_ratios).mean()
    tokens = sum(map(sum, _token_counts(pairs)))
    size = float((policy_ratios * policy_ratios).sum())
    return Retention(
        pairs=len(pairs),
        margin_before=float(before),
        margin_after=float(after),
        margin=float(after / before) if before else 0.0,
        change=float((policy_ratios * fused_ratios).sum()) / size if size else 0.0,
        mean_difference=float(np.abs(policy_ratios - fused_ratios).sum()) / tokens,
        of_answers=lack_rejected(pairs),
    )


def _is_labelled(pairs: Sequence[TokenizedPair]) -> bool:
    return pairs[0].desirable is not None


def _log_ratios(pairs: Sequence[TokenizedPair], start: PairLogps, end: PairLogps) -> Values:
    """Return the log-ratio of each completion, `end` minus `start`. (1 or 2, len(pairs))

    A preference pair has two completions (chosen and rejected), an unpaired example has one.
    """
    rows = [np.array(e) - np.array(s) for s, e in zip(start, end, strict=True)]
    return np.array(rows[:1] if _is_labelled(pairs) else rows, np.float64)


def _margins(pairs: Sequence[TokenizedPair], ratios: Values) -> Values:
    if _is_labelled(pairs):
        return ratios[0] * np.array([1.0 if pair.desirable else -1.0 for pair in pairs])
    return ratios[0] - ratios[1]


def _token_counts(pairs: Sequence[TokenizedPair]) -> list[tuple[int, ...]]:
    if _is_labelled(pairs):
        return [(pair.num_scored,) for pair in pairs]
    return [(len(pair.chosen), len(pair.rejected)) for pair in pairs]


@dataclass(frozen=True)
class RetentionMeter:
    """Log-probabilities of pairs under a run's reference and policy, to measure written models by.

    No model is held, so that the written model can be loaded in their place.
    """

    opened: OpenRun
    pairs: Sequence[TokenizedPair]
    reference: PairLogps
    policy: PairLogps

    @classmethod
    def of_run(
        cls, opened: OpenRun, base: LoadedModel, pairs: Sequence[TokenizedPair]
    ) -> "RetentionMeter":
        """Score the pairs with the run's reference, then with its policy, which stays in `base`."""
        load_reference_into(opened, base)
        reference = pair_logps(opened, base, pairs)
        load_adapter_into(opened, base)
        return cls(opened, pairs, reference, pair_logps(opened, base, pairs))

    def measure(self, written: LoadedModel) -> Retention:
        """Return how much of the training a written model retains."""
        fused = pair_logps(self.opened, written, self.pairs)
        return measure_retention(self.pairs, self.reference, self.policy, fused)


def pair_logps(opened: OpenRun, base: LoadedModel, pairs: Sequence[TokenizedPair]) -> PairLogps:
    """Return the log-probabilities of the completions in `pairs` under a model. (len(pairs),) each

    Each prompt with one completion is computed as one padded sequence, which is exact for every
    architecture.
    """
    use_generating_function(
        base.model, vocab_size=base.vocab_size, max_length=opened.config.length_limit
    )
    with phase("Scoring pairs", len(pairs), unit=opened.config.unit) as advance:
        return score_pairs(base.model, pairs, limit=opened.config.pass_limit, progress=advance)


def check_retention(
    output: Path, retention: Retention, *, min_retained: float, advice: str
) -> None:
    """Check that a written model retains neither too little nor too much of the training.

    The retained shares have to be at least `min_retained` and at most 2 - `min_retained`. An
    adapter that was merged twice, for example, gives a share of 2.

    Args:
        advice: what the user can do to keep more.

    Raises:
        RetentionError: a share is out of these bounds.
    """
    most = 2 - min_retained
    if min_retained <= retention.minimum and retention.maximum <= most:
        return
    bound = f"less than `--min-retained` {min_retained:g}"
    if retention.minimum >= min_retained:
        bound = f"which is beyond {most:.0%}"
    raise RetentionError(
        f"{output}: the fused model keeps {retention.margin:.1%} of the margin and "
        f"{retention.change:.1%} of the adapters' change of log-probabilities, {bound}, so it "
        f"was not written; {advice}, keep the adapter next to the model, or --force"
    )
