"""The HTML page of `mlx-dpo report`: figures, result, curves and settings of runs.

A page is one file, which loads nothing and runs one script of its own: the script draws the curves,
shows values under the pointer, and, if the page is served while a run trains, asks its server for
new rows.
"""

import math
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from importlib.resources import files
from typing import Any, NamedTuple

from mlx_dpo.reporting.curves import (
    CURVES,
    DETAILS,
    MACHINE,
    MAX_POINTS,
    REJECTED,
    RESULTS,
    Chart,
    Line,
)
from mlx_dpo.reporting.evaluations.shown_result import ShownResult
from mlx_dpo.reporting.html import render_page
from mlx_dpo.reporting.plots import DARK, LIGHT, MARKERS
from mlx_dpo.reporting.samples import EvaluationSamples

SECTIONS = ("summary", "samples", "evaluations", "settings")  # parts that a live page replaces
HEADINGS = {RESULTS: "Curves", DETAILS: "More curves", MACHINE: "Speed, memory and padding"}
# Shapes of `plots.MARKERS` around the origin, as SVG paths.
MARKER_PATHS = (
    "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0Z",
    "M-3-3H3V3H-3Z",
    "M0-4L3.8 3H-3.8Z",
    "M0-4L4 0L0 4L-4 0Z",
    "M0 4L3.8-3H-3.8Z",
    "M-1.3-4H1.3V-1.3H4V1.3H1.3V4H-1.3V1.3H-4V-1.3H-1.3Z",
    "M0-1.8L2.2-4L4-2.2L1.8 0L4 2.2L2.2 4L0 1.8L-2.2 4L-4 2.2L-1.8 0L-4-2.2L-2.2-4Z",
    "M0-4.4L1.1-1.4L4.2-1.4L1.7.6L2.6 3.6L0 1.8L-2.6 3.6L-1.7.6L-4.2-1.4L-1.1-1.4Z",
)
FIRST_METRICS = ("accuracy", "margin", "loss")  # of the table of several runs
DIGITS = 6  # significant digits of the values in a page


class Finding(NamedTuple):
    """A statement about a run; `level` is `good`, `unclear` or `bad`."""

    level: str
    text: str


class KeyFigure(NamedTuple):
    """A figure of the page's head; `before` is its value before training, if it is known."""

    label: str
    before: str | None
    after: str
    note: str


class SettingRow(NamedTuple):
    """A setting of a run as texts."""

    name: str
    value: str
    note: str  # what the default is, or why the value was chosen


class RunDetails(NamedTuple):
    """Texts about a run for the report page."""

    name: str
    state: str
    summary: str = ""  # model, data and loss
    figures: Sequence[KeyFigure] = ()
    result: Finding | None = None
    warnings: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()  # name and text
    changed: Sequence[SettingRow] = ()  # settings that were changed or chosen
    unchanged: Sequence[SettingRow] = ()
    settings: Mapping[str, str] = {}  # settings in which the runs of a report differ
    metrics: Mapping[str, str] = {}  # of the last evaluation, by label
    evaluations: Sequence[Mapping[str, str]] = ()  # by column
    samples: Sequence[EvaluationSamples] = ()
    results: Sequence[ShownResult] = ()  # of `mlx-dpo eval`

    @property
    def cells(self) -> Mapping[str, str]:
        """Settings and metrics by name, for the table of several runs."""
        return {**self.settings, **self.metrics}


class LiveStatus(NamedTuple):
    """What a run is doing, for a page that is served while it trains."""

    kind: str  # `waiting`, `training`, `finished`, `interrupted` or `failed`
    text: str
    done: int = 0
    total: int = 0


def render_run_page(runs: Sequence[RunDetails], charts: Sequence[Chart], x_axis: str) -> str:
    """Return the report page of one or several runs as one HTML file."""
    lines = [(chart.curve.title, line) for chart in charts for line in chart.lines]
    digest = b64encode(sha256(read_script()).digest()).decode()
    return render_page(
        "report.html",
        **_page_values(runs, x_axis),
        lines=[line for _, line in lines],
        data=_script_values(runs, x_axis) | {"lines": [line_values(*line) for line in lines]},
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        nonce=None,
        statuses=[],
    )


def render_live_page(
    runs: Sequence[RunDetails], statuses: Sequence[LiveStatus], x_axis: str, *, nonce: str
) -> str:
    """Return the page of runs in training, whose curves its script asks the server for.

    Args:
        statuses: What each run is doing.
        nonce: Nonce of the server's policy for styles and scripts.
    """
    return render_page(
        "report.html",
        **_page_values(runs, x_axis),
        lines=None,
        data=_script_values(runs, x_axis) | {"lines": [], "isLive": True},
        policy=None,
        nonce=nonce,
        statuses=statuses,
    )


def render_sections(runs: Sequence[RunDetails], statuses: Sequence[LiveStatus]) -> dict[str, str]:
    """Return the HTML of each part of the page that changes while runs train, by `SECTIONS`."""
    values = _section_values(runs) | {"statuses": statuses}
    return {name: render_page(f"report_{name}.html", **values) for name in SECTIONS}


def _page_values(runs: Sequence[RunDetails], x_axis: str) -> dict[str, Any]:
    sections = [
        (HEADINGS[section], section, [c for c in CURVES if c.section == section])
        for section in (RESULTS, DETAILS, MACHINE)
    ]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    names = ", ".join(run.name for run in runs)
    return _section_values(runs) | {
        "title": f"{title} · mlx-dpo",
        "names": names,
        "light": LIGHT,
        "dark": DARK,
        "x_axis": x_axis,
        "sections": sections,
        "note": describe_line_styles,
    }


def _script_values(runs: Sequence[RunDetails], x_axis: str) -> dict[str, Any]:
    """Return what the page's script has to know besides the lines."""
    return {
        "x": x_axis,
        "names": [run.name for run in runs],
        "markers": [MARKER_PATHS[marker_of(run)] for run in range(len(runs))],
        "colours": len(LIGHT.colours),
        "rejected": REJECTED,
    }


def _section_values(runs: Sequence[RunDetails]) -> dict[str, Any]:
    metrics = dict.fromkeys(label for run in runs for label in run.metrics)
    first = [label for label in FIRST_METRICS if label in metrics]
    return {
        "runs": runs,
        "differing": list(dict.fromkeys(label for run in runs for label in run.settings)),
        "metrics": first + [label for label in metrics if label not in first],
        "marker": lambda run: MARKER_PATHS[marker_of(run)],
        "num_colours": len(LIGHT.colours),
    }


def marker_of(run: int) -> int:
    """Return the index in `MARKERS` of the marker of a run."""
    return (run + run // len(MARKERS)) % len(MARKERS)


def describe_line_styles(lines: Sequence[Line] | None) -> str:
    """Return sentences that explain the line styles in the charts; None if more lines may come."""
    sentences = ["Dotted: the value of the reference model, or of chance."]
    if lines is None or any(line.smoothed != line.y for line in lines):
        sentences.append("Faint: every step; strong: trailing mean.")
    if lines is not None and any(line.is_downsampled for line in lines):
        sentences.append(
            f"Runs of more than {MAX_POINTS} steps are downsampled: a point is the mean of "
            "neighbouring steps."
        )
    if lines is not None and len({line.run for line in lines}) > len(MARKERS):
        sentences.append(f"Markers repeat after {len(MARKERS)} runs, with other colours.")
    return " ".join(sentences)


def line_values(title: str, line: Line, start: int = 0) -> dict[str, Any]:
    """Return a line, or its points from `start` on, as values for the page's script.

    Args:
        title: Title of the chart.
        start: Number of points that the page has already.
    """
    return {
        "chart": title,
        "run": line.run,
        "completion": line.completion,
        "heldOut": line.held_out,
        "start": start,
        "x": _round_all(line.x),
        "y": _round_all(line.y),
        "smoothed": None if line.smoothed is line.y else _round_all(line.smoothed),
    }


def _round_all(values: Iterable[float]) -> list[float | None]:
    """Return values with `DIGITS` digits; None, which JSON has, for infinities and NaN."""
    return [float(f"{v:.{DIGITS}g}") if math.isfinite(v) else None for v in values]


def read_script() -> bytes:
    """Return the script of the page."""
    return (files("mlx_dpo.reporting") / "templates" / "report.js").read_bytes()
