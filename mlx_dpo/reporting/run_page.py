"""The HTML page of `mlx-dpo report`: metrics, curves and settings of one or several runs."""

from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from mlx_dpo.reporting import plots
from mlx_dpo.reporting.curves import MAX_POINTS, Chart
from mlx_dpo.reporting.html import render_page
from mlx_dpo.reporting.plots import DARK, LIGHT, MARKERS


class RunDetails(NamedTuple):
    """Texts about a run for the report page."""

    name: str
    facts: Sequence[tuple[str, str]]  # name and text, below the curves
    settings: Mapping[str, str]  # settings in which the runs of a report differ
    metrics: Mapping[str, str]  # of the last evaluation, by label
    warnings: Sequence[str]

    @property
    def cells(self) -> Mapping[str, str]:
        """Settings and metrics by name, for the table above the curves."""
        return {**self.settings, **self.metrics}


class _Picture(NamedTuple):
    """A chart as two images (light and dark theme), given as data URIs, with alternative text."""

    light: str
    dark: str
    alt: str


def render_run_page(runs: Sequence[RunDetails], charts: Sequence[Chart], x_axis: str) -> str:
    """Return the report page of one or several runs as HTML."""
    names = [run.name for run in runs]
    legend = [plots.legend_svg(charts, names, theme) for theme in (LIGHT, DARK)]
    return render_page(
        "run.html",
        title=", ".join(names),
        light=LIGHT,
        dark=DARK,
        labels=list(dict.fromkeys(label for run in runs for label in run.cells)),
        runs=runs,
        note=_note(charts),
        legend=_picture(legend, ", ".join(names)),
        charts=[(chart, _draw(chart, names, x_axis)) for chart in charts],
    )


def _note(charts: Sequence[Chart]) -> str:
    """Return sentences that explain the line styles in the charts."""
    sentences = ["Dotted: the value of the reference model, or of chance."]
    lines = [line for chart in charts for line in chart.lines]
    if any(line.smoothed != line.y for line in lines):
        sentences.append("Faint: every step; strong: trailing mean.")
    if any(line.is_downsampled for line in lines):
        sentences.append(
            f"Runs of more than {MAX_POINTS} steps are downsampled: a point is the mean of "
            "neighbouring steps."
        )
    if len({line.run for line in lines}) > len(MARKERS):
        sentences.append(f"Markers repeat after {len(MARKERS)} runs, with other colours.")
    return " ".join(sentences)


def _draw(chart: Chart, names: Sequence[str], x_axis: str) -> _Picture:
    svgs = [plots.chart_svg(chart, len(names), x_axis, theme) for theme in (LIGHT, DARK)]
    return _picture(svgs, f"{chart.title}. {'. '.join(_describe_lines(chart, names))}")


def _describe_lines(chart: Chart, names: Sequence[str]) -> Iterator[str]:
    """Yield a sentence for screen readers about each line of a chart: its first and last value."""
    for line in chart.lines:
        parts = [names[line.run], line.completion, "held out" * line.held_out]
        first, last = line.smoothed[0], line.smoothed[-1]
        yield f"{', '.join(filter(None, parts))}: from {first:.4g} to {last:.4g}"


def _picture(svgs: Sequence[bytes], alt: str) -> _Picture:
    light, dark = (f"data:image/svg+xml;base64,{b64encode(svg).decode()}" for svg in svgs)
    return _Picture(light, dark, alt)
