"""What is drawn of runs: rows of metrics in, charts out. Pure; `drawing` makes pictures of them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

Row = Mapping[str, float]

CHOSEN, REJECTED = "chosen", "rejected"
HELD_OUT = "eval_"  # before the names of what was measured on held-out pairs
AXES = {"step": "step", "epoch": "epoch", "tokens": "num_tokens"}  # along x: the name in a row
WINDOW = 25  # a line's mean goes over so many-th parts of the run
SMOOTHED = 50  # points from which a mean says more than they do
MOST = 600  # points of one line; more cannot be told apart


class Line(NamedTuple):
    """One metric of one run."""

    run: int
    part: str  # `CHOSEN`, `REJECTED`, or nothing
    held_out: bool
    x: Sequence[float]
    y: Sequence[float]
    mean: Sequence[float]  # of y and of what came before it; y itself where it is not noisy
    is_thinned: bool = False  # a point is several neighbours


class Chart(NamedTuple):
    """What goes into one picture."""

    title: str
    unit: str
    meaning: str
    level: float | None  # of the reference itself, or of a coin
    lines: Sequence[Line]
    from_zero: bool = False  # less than nothing cannot be; small differences are to look small


class Curve(NamedTuple):
    """A chart that a run may have, and the metrics in it."""

    title: str
    unit: str
    meaning: str
    names: Mapping[str, str]  # part: name in a row
    level: float | None = None
    noisy: bool = True  # a step says little; a mean over some is drawn as well
    headline: bool = True  # belongs on a card, for those who did not train it
    from_zero: bool = False


CURVES = (
    Curve("Loss", "", "what is made small", {"": "loss"}),
    Curve(
        "Margin",
        "nats",
        "reward of chosen less that of rejected",
        {"": "rewards/margins"},
        level=0.0,
    ),
    Curve(
        "Accuracy",
        "share",
        "of pairs, or of judged answers, that the rewards put the right way round",
        {"": "rewards/accuracies"},
        level=0.5,
    ),
    Curve(
        "Rewards",
        "nats",
        "β × log-ratio to the reference, or what the loss rewards in its place",
        {CHOSEN: "rewards/chosen", REJECTED: "rewards/rejected"},
        level=0.0,
    ),
    Curve(
        "Log-probabilities",
        "nats an answer",
        "how likely whole answers are",
        {CHOSEN: "logps/chosen", REJECTED: "logps/rejected"},
    ),
    Curve("KL", "nats", "estimate of the divergence from the reference", {"": "kl"}, level=0.0),
    Curve(
        "Lengths",
        "tokens",
        "of the answers that were scored",
        {CHOSEN: "lengths/chosen", REJECTED: "lengths/rejected"},
        headline=False,
    ),
    Curve(
        "Margin and length",
        "correlation",
        "between how much longer chosen is and the margin; near 1 or -1: lengths are learnt",
        {"": "length_correlation"},
        level=0.0,
        headline=False,
    ),
    Curve("Gradient norm", "", "before clipping", {"": "grad_norm"}, from_zero=True),
    Curve("Learning rate", "", "of the step", {"": "learning_rate"}, noisy=False, headline=False),
    Curve(
        "Speed",
        "tokens a second",
        "without padding",
        {"": "tokens_per_second"},
        headline=False,
        from_zero=True,
    ),
    Curve(
        "Memory",
        "GB",
        "the most that MLX held so far",
        {"": "peak_memory_gb"},
        noisy=False,
        headline=False,
        from_zero=True,
    ),
    Curve(
        "Padding",
        "share of tokens",
        "that went through the layers for nothing",
        {"": "padding_share"},
        headline=False,
        from_zero=True,
    ),
)


def charts(
    runs: Sequence[Sequence[Row]], *, along: str = "step", headline: bool = False
) -> list[Chart]:
    """The charts that at least one run has something for; `headline`: those for a card.

    Args:
        runs: rows of each, in the order of steps.
        along: a key of `AXES`.
    """
    drawn = []
    for curve in CURVES:
        lines = [line for run, rows in enumerate(runs) for line in _lines(run, rows, curve, along)]
        if lines and (curve.headline or not headline):
            facts = (curve.title, curve.unit, curve.meaning, curve.level)
            drawn.append(Chart(*facts, lines, curve.from_zero))
    return drawn


def _lines(run: int, rows: Sequence[Row], curve: Curve, along: str) -> Iterator[Line]:
    # An evaluation says after which step it was; where that is along x, the step's own row says.
    reached = {row["step"]: row[AXES[along]] for row in rows if AXES[along] in row}
    for part, name in curve.names.items():
        for prefix in ("", HELD_OUT):
            whole = prefix + name
            found = [
                (reached[row["step"]], row[whole])
                for row in rows
                if whole in row and row["step"] in reached
            ]
            if found:
                yield _line(run, part, found, curve, held_out=bool(prefix))


def _line(
    run: int, part: str, found: list[tuple[float, float]], curve: Curve, *, held_out: bool
) -> Line:
    """Neighbours become their mean where there are more points than can be told apart."""
    count = len(found)
    smooth = curve.noisy and not held_out and count >= SMOOTHED
    width = 1 if held_out else -(-count // MOST)
    starts = range(0, count, width)
    x, y = (
        [_mean(axis[start : start + width]) for start in starts]
        for axis in zip(*found, strict=True)
    )
    ends = [min(start + width, count) for start in starts]
    means = trailing_mean([y for _, y in found], window(count), ends) if smooth else y
    return Line(run, part, held_out, x, y, means, width > 1)


def window(points: int) -> int:
    """How many points a mean goes over."""
    return max(5, points // WINDOW)


def trailing_mean(values: Sequence[float], width: int, ends: Iterable[int]) -> list[float]:
    """The mean of the last `width` of the first so many values: a step knows no later one."""
    return [_mean(values[max(0, end - width) : end]) for end in ends]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)  # `fmean` refuses infinities of both signs
