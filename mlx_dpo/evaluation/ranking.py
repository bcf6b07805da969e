"""What a judge says of the answers to one prompt; rewards and judge models both end here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mlx_dpo.evaluation.winrates import LOSS, TIE, WIN
from mlx_dpo.types import Message

Conversation = Sequence[Message]


@dataclass(frozen=True, slots=True)
class Ranking:
    """Points of each answer, higher is better, and why they may not be relied on."""

    points: tuple[float, ...]
    doubts: tuple[str, ...] = ()  # what went wrong in comparing them; empty where nothing did
    said: tuple[str, ...] = ()  # a judge model's own words

    @property
    def best(self) -> int:
        """Place of the best answer, the first of several."""
        return self.points.index(max(self.points))

    @property
    def worst(self) -> int:
        """Place of the worst answer, the last of several."""
        return len(self.points) - 1 - self.points[::-1].index(min(self.points))

    @property
    def is_tie(self) -> bool:
        """Whether no answer is better than another."""
        return max(self.points) == min(self.points)

    def outcome(self) -> float:
        """Of two answers: whether the first one won, tied or lost."""
        first, second = self.points
        return WIN if first > second else LOSS if first < second else TIE


class Judge(Protocol):
    """Whoever ranks answers."""

    name: str

    def rank(
        self, prompts: Sequence[Conversation], answers: Sequence[Sequence[str]]
    ) -> list[Ranking]:
        """One ranking for each prompt and its answers."""

    def facts(self) -> dict[str, Any]:
        """What the judgement depends on, for the rows that follow from it."""
