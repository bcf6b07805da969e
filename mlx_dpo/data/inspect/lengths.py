"""Length statistics of prompts and completions, and the length bias of the preferences."""

from array import array
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np


class LengthSummary(NamedTuple):
    """Median, 95th percentile and maximum of the lengths of all texts of one kind."""

    median: int
    most: int  # 95th percentile
    longest: int


class Bin(NamedTuple):
    """Histogram bin: number of texts of each kind that have a length from `low` to `high`."""

    low: int
    high: int
    counts: tuple[int, ...]


@dataclass(frozen=True)
class LengthBias:
    """Statistics on whether longer or shorter completions are preferred."""

    pairs: int
    chosen_longer: int
    rejected_longer: int
    # Pearson correlation of being chosen and length; None if all completions have equal length.
    correlation: float | None

    @property
    def accuracy(self) -> float:
        """Accuracy of always preferring the longer completion, or the shorter if that is better.

        Pairs with completions of equal length count half.
        """
        equal = self.pairs - self.chosen_longer - self.rejected_longer
        return (max(self.chosen_longer, self.rejected_longer) + equal / 2) / self.pairs

    @property
    def is_significant(self) -> bool:
        """True if longer or shorter completions are preferred significantly often.

        The counts `chosen_longer` and `rejected_longer` must differ by more than three standard
        deviations of the difference that chance would give.
        """
        uneven = self.chosen_longer + self.rejected_longer
        return bool((self.chosen_longer - self.rejected_longer) ** 2 > 9 * uneven)

    def to_dict(self) -> dict[str, Any]:
        """Return the statistics as a JSON-compatible dictionary."""
        return asdict(self) | {"told_apart": self.accuracy}


class Lengths:
    """Lengths of prompts and completions before truncation, in tokens or in characters."""

    def __init__(self, unit: str, parts: tuple[str, ...]) -> None:
        self.unit = unit
        self.parts = parts  # `prompt`, `chosen`, `rejected`; or `prompt`, `answer`
        self._columns = [array("L") for _ in parts]

    def add(self, *lengths: int) -> None:
        """Append the lengths of prompt and completions of one pair or unpaired example."""
        for column, length in zip(self._columns, lengths, strict=True):
            column.append(length)

    def __len__(self) -> int:
        return len(self._columns[0])

    def summaries(self) -> dict[str, LengthSummary]:
        """Return a summary of the lengths of prompts and of each kind of completion, by name.

        There must be at least one pair.
        """
        return {
            part: LengthSummary(
                *(int(x) for x in np.quantile(column, (0.5, 0.95, 1.0), method="higher"))
            )
            for part, column in zip(self.parts, self._columns, strict=True)
        }

    def histogram(self) -> list[Bin]:
        """Return histogram bins of doubling width, shortest lengths first.

        There must be at least one pair.
        """
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

    def bias(self) -> LengthBias | None:
        """Return the length bias of the pairs; None for unpaired examples or without pairs."""
        if len(self.parts) < 3 or not len(self):
            return None
        chosen, rejected = (np.array(column, np.float64) for column in self._columns[1:])
        both = np.concatenate([chosen, rejected])
        spread = both.std()
        # As half of all completions are chosen, this is Pearson's coefficient.
        correlation = float((chosen.mean() - rejected.mean()) / 2 / spread) if spread else None
        return LengthBias(
            len(self), int((chosen > rejected).sum()), int((rejected > chosen).sum()), correlation
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the statistics as a JSON-compatible dictionary; without pairs, only the unit."""
        if not len(self):
            return {"unit": self.unit}
        bias = self.bias()
        return {
            "unit": self.unit,
            **{part: summary._asdict() for part, summary in self.summaries().items()},
            "histogram": [
                {"from": bin.low, "to": bin.high, **dict(zip(self.parts, bin.counts, strict=True))}
                for bin in self.histogram()
            ],
            "bias": bias.to_dict() if bias else None,
        }
