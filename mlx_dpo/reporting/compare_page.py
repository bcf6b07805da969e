"""The HTML page of `mlx-dpo compare`: completions next to each other, shaded by log-ratio."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mlx_dpo.reporting.html import render_page

SHADE_STEPS = (0.1, 0.5, 2.0)  # |log-ratio| in nats from which a span gets shade 1, 2, 3
# What the page and the terminal say about the shades; π is an aligned model, π_ref its base.
EXPLANATION = (
    "Each token is shaded by its log-ratio log π − log π_ref, in nats: blue is more likely under "
    "the aligned model (π) than under its base (π_ref), orange is less likely."
)
END_MARK = "∎"  # shown for the end-of-sequence token
END_EXPLANATION = f"{END_MARK} is the stop token, which ends the answer."


class Swatch(NamedTuple):
    """An entry of the legend: a shade and the log-ratios that have it."""

    level: int  # from -3 to 3
    label: str  # bounds of the log-ratio, with their signs

    @property
    def css_class(self) -> str:
        """CSS class of the shade."""
        return _level_class(self.level)


def legend_swatches() -> list[Swatch]:
    """Return the entries of the legend, from the lowest log-ratio to the highest."""
    low, middle, high = (f"{step:g}" for step in SHADE_STEPS)
    return [
        Swatch(-3, f"−{high} or less"),
        Swatch(-2, f"−{high} to −{middle}"),
        Swatch(-1, f"−{middle} to −{low}"),
        Swatch(0, f"−{low} to +{low}"),
        Swatch(1, f"+{low} to +{middle}"),
        Swatch(2, f"+{middle} to +{high}"),
        Swatch(3, f"+{high} or more"),
    ]


class Completion(NamedTuple):
    """A completion as tokens, each with its text and log-ratio (log π − log π_ref, in nats)."""

    spans: Sequence[tuple[str, float]]
    end: float | None  # log-ratio of the end-of-sequence token; None if the completion was cut

    @property
    def log_ratio(self) -> float:
        """Log-ratio of the whole completion with its end token, in nats."""
        return sum(ratio for _, ratio in self.spans) + (self.end or 0.0)


class Comparison(NamedTuple):
    """The content of the comparison page: completions of M models to P prompts."""

    title: str
    notes: Sequence[str]
    names: Sequence[str]  # (M,)
    prompts: Sequence[Sequence[tuple[str, str]]]  # (P,) of (role, text) per turn
    completions: Sequence[Sequence[Completion]]  # (P, M)
    summaries: Sequence[Mapping[str, str]]  # (M,) of label: value, with the same labels


def render_compare_page(comparison: Comparison) -> str:
    """Return the comparison page as HTML."""
    rows = [
        (turns, list(zip(comparison.names, completions, strict=True)))
        for turns, completions in zip(comparison.prompts, comparison.completions, strict=True)
    ]
    return render_page(
        "compare.html",
        title=comparison.title,
        notes=comparison.notes,
        explanation=EXPLANATION,
        swatches=legend_swatches(),
        end_explanation=END_EXPLANATION,
        end_mark=END_MARK,
        names=comparison.names,
        rows=rows,
        summaries=comparison.summaries,
        shade_class=_shade_class,
    )


def shade_level(log_ratio: float) -> int:
    """Return the shade of a token, from -3 to 3, for its log-ratio in nats."""
    level = sum(abs(log_ratio) >= step for step in SHADE_STEPS)
    return level if log_ratio > 0 else -level


def _shade_class(log_ratio: float) -> str:
    """Return the CSS class for a log-ratio: `u1` to `u3` (up), `d1` to `d3` (down) or ""."""
    return _level_class(shade_level(log_ratio))


def _level_class(level: int) -> str:
    return f"{'u' if level > 0 else 'd'}{abs(level)}" if level else ""
