"""Input of the monitor: settings, statistics of the pairs, and rows of metrics."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

Row = Mapping[str, float]

MIN_WINDOW, MAX_WINDOW = 10, 50  # steps in a window: fewer are noise, more warn too late


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
    rejected_tokens: float = 0.0  # mean length of a rejected completion; 0: unknown
    chosen_longer: float = 0.5  # share of pairs whose chosen completion is longer, ties half
    referenced: bool = True  # whether rewards are beta times log-ratios to the initial policy
    from_start: bool = True  # whether rewards were zero, or equal, before the first step
    supervised: bool = False  # whether the run is instruction tuning, which has no rewards

    @property
    def gentler(self) -> str:
        """What to change so that training changes the policy less."""
        beta = "" if self.supervised else f", a larger beta than {self.beta:g}"
        return f"a smaller learning_rate than {self.learning_rate:g}{beta}, or fewer steps"

    @property
    def window(self) -> int:
        """Number of steps over which the monitor averages metrics."""
        return min(MAX_WINDOW, max(MIN_WINDOW, self.total_steps // 10))


def mean(rows: Sequence[Row], name: str, size: Callable[[float], float] = float) -> float | None:
    """Return the mean of the metric `name` over the rows that have it; None if no row has it.

    The function `size`, such as `abs`, is applied to each value before averaging.
    """
    values = [size(row[name]) for row in rows if name in row]
    return fmean(values) if values else None


def span(rows: Sequence[Row]) -> str:
    """Return the steps of the rows as text."""
    if len(rows) == 1:
        return f"step {int(rows[0]['step'])}"
    return f"steps {int(rows[0]['step'])} to {int(rows[-1]['step'])}"
