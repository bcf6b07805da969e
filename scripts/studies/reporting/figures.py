"""Draw the pictures of studies: a style for plain matplotlib, and lines with a band over seeds.

Series can be distinguished without colours, by markers and dashes.

    def draw(figure, rows, theme):
        axes = add_axes(figure, 1, 2, 1, x_label="KL (nats)", y_label="reward")
        for index, method in enumerate(distinct(rows, "method")):
            draw_spread(axes, theme, index, of(rows, method=method), "kl", "reward", label=method)
        add_legend(figure)
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_dpo.reporting.plots import MARKERS, Theme, make_figure, matplotlib_style, render
from scripts.studies.reporting.study import Picture, Rows, column, distinct, of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
BAND = 0.18  # opacity of a band
MAX_COLUMNS = 5  # of a legend


def draw_picture(picture: Picture, rows: Rows, theme: Theme, file_format: str = "svg") -> bytes:
    """Return a picture of a study as an SVG or PNG file; the same rows give the same file."""
    import matplotlib

    with matplotlib_style(theme):
        matplotlib.rcParams.update(_style(theme))
        figure = make_figure(*picture.size)
        picture.draw(figure, rows, theme)
        return render(figure, file_format, theme)


def add_axes(
    figure: "Figure",
    rows: int,
    columns: int,
    index: int,
    *,
    x_label: str,
    y_label: str,
    **more: Any,
) -> "Axes":
    """Add the panel `index`, counted from 1, of a grid of panels; return its axes.

    Args:
        more: properties of the axes, such as `title` or `xscale="log"`.
    """
    axes = figure.add_subplot(rows, columns, index, xlabel=x_label, ylabel=y_label)
    if "title" in more:
        axes.set_title(more.pop("title"))
    axes.set(**more)
    return axes


def line_style(theme: Theme, index: int, *, marker: bool = True) -> dict[str, Any]:
    """Return the style of the series `index` as arguments of `axes.plot`."""
    return {
        "color": theme.colours[index % len(theme.colours)],
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)] if marker else "",
    }


def spread_over(rows: Rows, x: str, y: str) -> tuple[np.ndarray, ...]:
    """Return the distinct numbers of column `x`, and mean, minimum and maximum of `y` at each.

    With one row per seed at each x, these are mean and range over the seeds.
    """
    places = sorted(distinct(rows, x))
    values = [np.array(column(of(rows, **{x: place}), y)) for place in places]
    mean, low, high = (np.array([f(v) for v in values]) for f in (np.mean, np.min, np.max))
    return np.array(places, float), mean, low, high


def draw_spread(
    axes: "Axes", theme: Theme, index: int, rows: Rows, x: str, y: str, **style: Any
) -> None:
    """Draw the mean of `y` over `x` as the series `index`, with a band from minimum to maximum.

    Args:
        style: arguments of `axes.plot` that differ from `line_style`, and the `label`.
    """
    places, mean, low, high = spread_over(rows, x, y)
    style = line_style(theme, index) | style
    axes.plot(places, mean, **style)
    if (high > low).any():
        axes.fill_between(places, low, high, color=style["color"], alpha=BAND, linewidth=0)


def add_legend(figure: "Figure", *, columns: int = MAX_COLUMNS, among: Sequence[Any] = ()) -> None:
    """Add one legend above the panels, with every label of theirs once.

    Args:
        among: the axes whose labels are listed; all by default.
    """
    entries: dict[str, Any] = {}
    for axes in among or figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(
        entries.values(), entries.keys(), loc="outside upper left", ncols=min(columns, len(entries))
    )


def _style(theme: Theme) -> dict[str, Any]:
    return {
        "text.parse_math": True,  # tick labels of logarithmic axes are formulas
        "font.size": 9.5,
        "axes.facecolor": theme.paper,
        "axes.edgecolor": theme.faint,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlecolor": theme.ink,
        "axes.labelsize": 9.5,
        **{f"axes.spines.{side}": False for side in ("top", "right", "left", "bottom")},
        "grid.color": theme.faint,
        "grid.linewidth": 0.6,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "legend.handlelength": 2.8,
        "lines.linewidth": 1.7,
        "lines.markersize": 5.5,
        **{f"{axis}tick.{key}": 0 for axis in "xy" for key in ("major.size", "minor.size")},
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "errorbar.capsize": 3,
    }
