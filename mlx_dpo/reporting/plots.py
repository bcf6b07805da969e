"""Draw charts with matplotlib, which is imported only when a chart is drawn.

Lines can be distinguished without colours: up to eight runs by their markers, rejected by dashes,
held-out pairs by filled markers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_dpo.reporting.curves import REJECTED, Chart, Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHART_WIDTH, CHART_HEIGHT = 4.6, 3.1  # inches
CHART_COLUMNS = 2  # of the PNG
MIN_LEGEND_HEIGHT = 0.5  # inches above the charts of the PNG
DPI = 150  # of the PNG
MARKERS = "os^DvPX*"
MAX_LEGEND_COLUMNS = 4
MAX_NAME_LENGTH = 80  # characters; the middle of a longer run name is left out
FONTS = ("DejaVu Sans", "Hiragino Sans", "PingFang SC", "Apple SD Gothic Neo", "Noto Sans CJK SC")


class Theme(NamedTuple):
    """The colours of a plot; they can be distinguished with colour-vision deficiency.

    Source: Okabe and Ito 2008, Color Universal Design.
    """

    paper: str
    ink: str
    faint: str
    colours: Sequence[str]


LIGHT = Theme(
    "#ffffff", "#1f2328", "#d0d7de",
    ("#0072b2", "#d55e00", "#009e73", "#a3478b", "#8a6d00", "#3b3b98", "#5f5f5f", "#8c2d04"),
)  # fmt: skip
DARK = Theme(
    "#14171c", "#e6edf3", "#3d444d",
    ("#56b4e9", "#ff9248", "#3fcf9e", "#e79ac6", "#f0d64a", "#a5a5ff", "#b8b8b8", "#ffb3a0"),
)  # fmt: skip


def charts_png(charts: Sequence[Chart], names: Sequence[str], x_label: str) -> bytes:
    """Draw all charts and a legend into one PNG image on a white background.

    Args:
        names: names of the runs, for the legend.
    """
    rows = -(-len(charts) // CHART_COLUMNS)
    with matplotlib_style(LIGHT):
        figure = make_figure(CHART_WIDTH * CHART_COLUMNS, CHART_HEIGHT * rows)
        for index, chart in enumerate(charts, 1):
            axes = figure.add_subplot(rows, CHART_COLUMNS, index)
            _draw_chart(axes, chart, len(names), x_label, LIGHT)
        handles = _legend_handles([line for chart in charts for line in chart.lines], names, LIGHT)
        legend = _add_legend(figure, handles, "outside upper left")
        legend_height = legend.get_window_extent().height / figure.dpi
        figure.set_figheight(CHART_HEIGHT * rows + max(MIN_LEGEND_HEIGHT, legend_height))
        return render(figure, "png", LIGHT)


def chart_svg(chart: Chart, runs: int, x_label: str, theme: Theme) -> bytes:
    """Draw one chart, which shows `runs` runs, as an SVG image."""
    with matplotlib_style(theme):
        figure = make_figure(CHART_WIDTH, CHART_HEIGHT)
        _draw_chart(figure.add_subplot(), chart, runs, x_label, theme)
        return render(figure, "svg", theme)


def _add_legend(
    figure: "Figure", handles: Sequence[Any], location: Any, columns: int = MAX_LEGEND_COLUMNS
) -> Any:
    """Add a legend to the figure with as many columns as fit, at most `columns`."""
    legend = figure.legend(
        handles=handles, loc=location, ncols=columns, frameon=False, handlelength=3.2
    )
    if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
        return legend
    legend.remove()
    return _add_legend(figure, handles, location, columns - 1)


def make_figure(width: float, height: float) -> "Figure":
    """Return an empty figure, its size in inches."""
    from matplotlib.figure import Figure  # not pyplot, which needs a display

    return Figure(figsize=(width, height), layout="constrained")


@contextmanager
def matplotlib_style(theme: Theme) -> Iterator[None]:
    """Draw in the theme inside the block, and ignore the user's `matplotlibrc` file."""
    import matplotlib
    from matplotlib.font_manager import fontManager

    installed = set(fontManager.get_font_names())
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.family": [font for font in FONTS if font in installed],
                "text.parse_math": False,  # a run may be named `a$b$`
                "svg.hashsalt": "",  # deterministic ids: the same chart is the same file
                "text.color": theme.ink,
                "axes.labelcolor": theme.ink,
                "xtick.color": theme.ink,
                "ytick.color": theme.ink,
            }
        )
        yield


def render(figure: "Figure", file_format: str, theme: Theme) -> bytes:
    """Return the figure as the bytes of an SVG or PNG file; the same figure gives the same file."""
    file = BytesIO()
    # None leaves out the date and the version of matplotlib.
    metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}[file_format]
    figure.savefig(file, format=file_format, dpi=DPI, facecolor=theme.paper, metadata=metadata)
    return file.getvalue()


def _draw_chart(axes: "Axes", chart: Chart, runs: int, x_label: str, theme: Theme) -> None:
    axes.set_title(chart.curve.title, loc="left", fontsize=11, fontweight="bold")
    axes.set_title(chart.curve.unit, loc="right", fontsize=9)
    axes.set_xlabel(x_label, loc="right", fontsize=9)
    axes.set_facecolor(theme.paper)
    axes.grid(color=theme.faint, linewidth=0.6)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=9)
    if chart.curve.baseline is not None:
        axes.axhline(chart.curve.baseline, color=theme.ink, linewidth=0.8, linestyle=(0, (1, 3)))
    for line in chart.lines:
        _draw_line(axes, line, runs, theme)
    if all(float(x).is_integer() for line in chart.lines for x in line.x):
        from matplotlib.ticker import MaxNLocator

        # There is no half step or round.
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    if chart.curve.starts_at_zero:
        axes.axhline(0, visible=False)  # includes 0 in the limits, also of a constant line
        axes.set_ylim(0, None if any(any(line.y) for line in chart.lines) else 1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.10g}")


def _draw_line(axes: "Axes", line: Line, runs: int, theme: Theme) -> None:
    style = _line_style(line, runs, theme)
    if len(line.x) == 1:
        style["marker"] = style["marker"] or MARKERS[0]  # a single point without one is invisible
    if line.smoothed != line.y:
        axes.plot(line.x, line.y, color=style["color"], linewidth=0.8, alpha=0.25)
    every = max(1, len(line.x) // 6)
    markevery = 1 if line.held_out else (every // 2, every)
    axes.plot(line.x, line.smoothed, markevery=markevery, **style)


def _line_style(line: Line, runs: int, theme: Theme) -> dict[str, Any]:
    """Return the style of a line as matplotlib arguments.

    Colours distinguish runs; with a single run they distinguish chosen and rejected.
    """
    is_rejected = line.completion == REJECTED
    colour = theme.colours[(line.run if runs > 1 else is_rejected) % len(theme.colours)]
    has_marker = line.held_out or runs > 1
    marker = MARKERS[(line.run + line.run // len(MARKERS)) % len(MARKERS)]
    return {
        "color": colour,
        "linestyle": (0, (4, 2)) if is_rejected else "-",
        "linewidth": 1.0 if line.held_out else 1.7,
        "marker": marker if has_marker else "",
        "markersize": 5.5,
        "markerfacecolor": colour if line.held_out else theme.paper,
    }


def _legend_handles(lines: Sequence[Line], names: Sequence[str], theme: Theme) -> list[Any]:
    """Return the legend's entries: one per run, then those for dashes and filled markers."""
    from matplotlib.lines import Line2D

    runs, plain = len(names), Line(0, "", held_out=False, x=(), y=(), smoothed=())
    entries = [("train", _line_style(plain, runs, theme))] if runs == 1 else []
    if runs > 1:
        styles = (_line_style(plain._replace(run=run), runs, theme) for run in range(runs))
        entries += zip(map(_shorten, names), styles, strict=True)
    meanings = {}
    # With several runs, an entry that holds for all of them has no run's colour and marker.
    neutral = {"color": theme.ink, "marker": ""} if runs > 1 else {}
    for completion, held_out in sorted({(line.completion, line.held_out) for line in lines}):
        label = " ".join([completion] * (completion == REJECTED) + ["held out"] * held_out)
        if label and (runs == 1 or label in (REJECTED, "held out")):
            line = plain._replace(completion=completion, held_out=held_out)
            marker = {"marker": "o", "markerfacecolor": theme.ink} if held_out and neutral else {}
            meanings[label] = _line_style(line, runs, theme) | neutral | marker
    return [Line2D([], [], label=label, **style) for label, style in [*entries, *meanings.items()]]


def _shorten(name: str) -> str:
    half = MAX_NAME_LENGTH // 2
    return name if len(name) <= MAX_NAME_LENGTH else f"{name[: half - 1]}…{name[-half:]}"
