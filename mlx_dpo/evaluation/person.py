"""Win rates by people: the votes of each rater, the rate, and the bias for the first answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_dpo.evaluation.agreement import Agreement, measure_agreement
from mlx_dpo.evaluation.rewards import TIE
from mlx_dpo.evaluation.winrate import WinRate, wilson_interval, win_rate


@dataclass(frozen=True, slots=True)
class Vote:
    """A rater's verdict on one prompt."""

    prompt: str  # key of the prompt
    outcome: float  # `WIN`, `TIE` or `LOSS` of the run
    length_difference: int  # length of the run's answer minus that of the opponent's, in characters
    first_won: bool | None  # whether the better answer was shown first; None on a tie


@dataclass(frozen=True, slots=True)
class PositionBias:
    """How often the answer shown first was the better one; ties do not count.

    The order is random, so a rater without a bias for a position has a share of about 0.5.
    """

    first_won: int
    count: int

    @property
    def share(self) -> float:
        """Share of the verdicts in which the first answer won."""
        return self.first_won / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share."""
        return wilson_interval(self.first_won, self.count)


@dataclass(frozen=True)
class RaterResult:
    """The votes of one rater, and how many prompts have none."""

    name: str
    votes: Sequence[Vote]
    identical: int = 0  # prompts with two equal answers, which tie without a vote
    skipped: int = 0
    undecided: int = 0

    @property
    def rate(self) -> WinRate | None:
        """The win rate, with identical answers as ties; None if nothing is decided yet."""
        if not self.votes and not self.identical:
            return None
        outcomes = [vote.outcome for vote in self.votes] + [TIE] * self.identical
        lengths = [vote.length_difference for vote in self.votes] + [0] * self.identical
        return win_rate(outcomes, lengths)

    @property
    def position(self) -> PositionBias | None:
        """The bias for the answer shown first; None if every vote is a tie."""
        won = [vote.first_won for vote in self.votes if vote.first_won is not None]
        return PositionBias(sum(won), len(won)) if won else None

    def to_dict(self) -> dict[str, Any]:
        """Return the rate, the counts and the bias as JSON values."""
        rate, position = self.rate, self.position
        return {
            "rater": self.name,
            **({"judged": 0} if rate is None else rate.to_dict()),
            "identical": self.identical,
            "skipped": self.skipped,
            "undecided": self.undecided,
            "first_shown_won": None if position is None else position.share,
            "first_shown_won_interval_95": None if position is None else list(position.interval),
        }


def rater_agreement(raters: Sequence[RaterResult]) -> Agreement | None:
    """Return the agreement of the raters who voted on wins, ties and losses.

    The result is None if fewer than two voted, or if two of them share no prompt.
    """
    voted = [rater for rater in raters if rater.votes]
    return measure_agreement([{vote.prompt: vote.outcome for vote in r.votes} for r in voted])
