"""How long prompts and answers are, and how far length alone tells which answer is better."""

from array import array
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np


class Spread(NamedTuple):
    """Lengths of one part of all pairs."""

    median: int
    most: int  # 95 % are no longer
    longest: int


class Bin(NamedTuple):
    """How many of each part are from `low` to `high` long."""

    low: int
    high: int
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Bias:
    """How lengths go with what was preferred, over pairs."""

    pairs: int
    chosen_longer: int
    rejected_longer: int
    correlation: float | None  # between being chosen and length, over answers; None: all alike

    @property
    def told_apart(self) -> float:
        """Share of the pairs that length alone tells apart; of equal ones half by luck."""
        equal = self.pairs - self.chosen_longer - self.rejected_longer
        return (max(self.chosen_longer, self.rejected_longer) + equal / 2) / self.pairs

    @property
    def beyond_chance(self) -> bool:
        """Whether the difference is larger than three standard deviations of tossing coins."""
        uneven = self.chosen_longer + self.rejected_longer
        return bool((self.chosen_longer - self.rejected_longer) ** 2 > 9 * uneven)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"told_apart": self.told_apart}


class Lengths:
    """Lengths of prompts and answers before anything is cut, in tokens or in characters."""

    def __init__(self, unit: str, parts: tuple[str, ...]) -> None:
        self.unit = unit
        self.parts = parts  # `prompt`, `chosen`, `rejected`; or `prompt`, `answer`
        self._columns = [array("L") for _ in parts]

    def add(self, *lengths: int) -> None:
        """One pair, or judged answer."""
        for column, length in zip(self._columns, lengths, strict=True):
            column.append(length)

    def __len__(self) -> int:
        return len(self._columns[0])

    def spreads(self) -> dict[str, Spread]:
        """Of each part; there must be a pair."""
        return {
            part: Spread(*(int(x) for x in np.quantile(column, (0.5, 0.95, 1.0), method="higher")))
            for part, column in zip(self.parts, self._columns, strict=True)
        }

    def histogram(self) -> list[Bin]:
        """Bins that double in width, from the shortest to the longest; there must be a pair."""
        # 0 has a bin of its own, then 1, 2 to 3, 4 to 7, …
        numbers = [np.frexp(np.array(column, np.float64))[1] for column in self._columns]
        low, high = min(int(n.min()) for n in numbers), max(int(n.max()) for n in numbers)
        return [
            Bin(
                2 ** (k - 1) if k else 0,
                2**k - 1 if k else 0,
                tuple(int((n == k).sum()) for n in numbers),
            )
            for k in range(low, high + 1)
        ]

    def bias(self) -> Bias | None:
        """What length says of pairs; None of judged answers."""
        if len(self.parts) < 3 or not len(self):
            return None
        chosen, rejected = (np.array(column, np.float64) for column in self._columns[1:])
        both = np.concatenate([chosen, rejected])
        spread = both.std()
        # Half of all answers are chosen: then this is Pearson's coefficient.
        correlation = float((chosen.mean() - rejected.mean()) / 2 / spread) if spread else None
        return Bias(
            len(self), int((chosen > rejected).sum()), int((rejected > chosen).sum()), correlation
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values; without pairs the unit alone."""
        if not len(self):
            return {"unit": self.unit}
        bias = self.bias()
        return {
            "unit": self.unit,
            **{part: spread._asdict() for part, spread in self.spreads().items()},
            "histogram": [
                {"from": one.low, "to": one.high, **dict(zip(self.parts, one.counts, strict=True))}
                for one in self.histogram()
            ],
            "bias": bias.to_dict() if bias else None,
        }
