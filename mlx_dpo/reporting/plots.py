"""Charts as pictures, by matplotlib, which is imported only here and only when something is drawn.

What a line is can be told without colours: up to eight runs by their marks, parts by their dashes,
held-out pairs by filled marks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_dpo.reporting.curves import REJECTED, Chart, Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, HIGH = 4.6, 3.1  # inches of one chart
COLUMNS = 2
ABOVE = 0.5  # inches for a legend, at least
DOTS = 150  # per inch of a PNG
MARKS = "os^DvPX*"
COLUMNS_OF_LEGEND = 4  # at most; long names leave room for fewer
LONGEST = 80  # characters of a name; of longer ones the middle is left out
FONTS = ("DejaVu Sans", "Hiragino Sans", "PingFang SC", "Apple SD Gothic Neo", "Noto Sans CJK SC")


class Theme(NamedTuple):
    """Colours, told apart also by those who see few of them (Okabe and Ito 2008)."""

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


def png(charts: Sequence[Chart], names: Sequence[str], along: str) -> bytes:
    """All charts in one picture on white paper, which is readable on any page.

    Args:
        names: of the runs.
        along: what x is.
    """
    rows = -(-len(charts) // COLUMNS)
    with _style(LIGHT):
        figure = _figure(WIDE * COLUMNS, HIGH * rows)
        for place, chart in enumerate(charts):
            _draw(figure.add_subplot(rows, COLUMNS, place + 1), chart, len(names), along, LIGHT)
        keys = _keys([line for chart in charts for line in chart.lines], names, LIGHT)
        drawn = _legend(figure, keys, "outside upper left")
        above = drawn.get_window_extent().height / figure.dpi
        figure.set_figheight(HIGH * rows + max(ABOVE, above))
        return _saved(figure, "png", LIGHT)


def svg(chart: Chart, runs: int, along: str, theme: Theme) -> bytes:
    """One chart of so many runs, as large as it is shown."""
    with _style(theme):
        figure = _figure(WIDE, HIGH)
        _draw(figure.add_subplot(), chart, runs, along, theme)
        return _saved(figure, "svg", theme)


def legend(charts: Sequence[Chart], names: Sequence[str], theme: Theme) -> bytes:
    """What lines, dashes and marks mean, as an SVG."""
    keys = _keys([line for chart in charts for line in chart.lines], names, theme)
    with _style(theme):
        figure = _figure(COLUMNS * WIDE, HIGH)
        drawn = _legend(figure, keys, "center left")
        figure.set_figheight(drawn.get_window_extent().height / figure.dpi)
        return _saved(figure, "svg", theme)


def _legend(
    figure: "Figure", keys: Sequence[Any], place: Any, columns: int = COLUMNS_OF_LEGEND
) -> Any:
    """In so many columns, or in as many as there is room for."""
    drawn = figure.legend(handles=keys, loc=place, ncols=columns, frameon=False, handlelength=3.2)
    if columns == 1 or drawn.get_window_extent().width <= figure.bbox.width:
        return drawn
    drawn.remove()
    return _legend(figure, keys, place, columns - 1)


def _figure(wide: float, high: float) -> "Figure":
    from matplotlib.figure import Figure  # never pyplot, which wants a screen

    return Figure(figsize=(wide, high), layout="constrained")


@contextmanager
def _style(theme: Theme) -> Iterator[None]:
    """Ours, whatever a `matplotlibrc` of the reader's wants."""
    import matplotlib
    from matplotlib.font_manager import fontManager

    there = set(fontManager.get_font_names())
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.family": [font for font in FONTS if font in there],
                "text.parse_math": False,  # a run may be named `a$b$`
                "svg.hashsalt": "",  # the same picture is the same file
                "text.color": theme.ink,
                "axes.labelcolor": theme.ink,
                "xtick.color": theme.ink,
                "ytick.color": theme.ink,
            }
        )
        yield


def _saved(figure: "Figure", kind: str, theme: Theme) -> bytes:
    file = BytesIO()
    no_names = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}[kind]
    figure.savefig(file, format=kind, dpi=DOTS, facecolor=theme.paper, metadata=no_names)
    return file.getvalue()


def _draw(axes: "Axes", chart: Chart, runs: int, along: str, theme: Theme) -> None:
    axes.set_title(chart.title, loc="left", fontsize=11, fontweight="bold")
    axes.set_title(chart.unit, loc="right", fontsize=9)
    axes.set_xlabel(along, loc="right", fontsize=9)
    axes.set_facecolor(theme.paper)
    axes.grid(color=theme.faint, linewidth=0.6)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=9)
    if chart.level is not None:
        axes.axhline(chart.level, color=theme.ink, linewidth=0.8, linestyle=(0, (1, 3)))
    for line in chart.lines:
        _draw_line(axes, line, runs, theme)
    if chart.from_zero:
        axes.axhline(0, visible=False)  # so that there is room above what never changes
        axes.set_ylim(0, None if any(any(line.y) for line in chart.lines) else 1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.10g}")


def _draw_line(axes: "Axes", line: Line, runs: int, theme: Theme) -> None:
    look = _look(line, runs, theme)
    if len(line.x) == 1:
        look["marker"] = look["marker"] or MARKS[0]  # a line from a point to itself is nothing
    if line.mean != line.y:
        axes.plot(line.x, line.y, color=look["color"], linewidth=0.8, alpha=0.25)
    every = max(1, len(line.x) // 6)
    axes.plot(line.x, line.mean, markevery=1 if line.held_out else (every // 2, every), **look)


def _look(line: Line, runs: int, theme: Theme) -> dict[str, Any]:
    """Of one run the parts have colours, of several the runs do; see the top of this file."""
    rejected = line.part == REJECTED
    colour = theme.colours[(line.run if runs > 1 else rejected) % len(theme.colours)]
    marked = line.held_out or runs > 1
    return {
        "color": colour,
        "linestyle": (0, (4, 2)) if rejected else "-",
        "linewidth": 1.0 if line.held_out else 1.7,
        "marker": MARKS[(line.run + line.run // len(MARKS)) % len(MARKS)] if marked else "",
        "markersize": 5.5,
        "markerfacecolor": colour if line.held_out else theme.paper,
    }


def _keys(lines: Sequence[Line], names: Sequence[str], theme: Theme) -> list[Any]:
    """The legend: runs, if there are several; then what dashes and filled marks mean."""
    from matplotlib.lines import Line2D

    runs, plain = len(names), Line(0, "", held_out=False, x=(), y=(), mean=())
    keys = [("train", _look(plain, runs, theme))] if runs == 1 else []
    if runs > 1:
        looks = (_look(plain._replace(run=run), runs, theme) for run in range(runs))
        keys += zip(map(_shortened, names), looks, strict=True)
    meant = {}
    # What holds for every run is shown in nobody's colour and with nobody's mark.
    anyone = {"color": theme.ink, "marker": ""} if runs > 1 else {}
    for part, held_out in sorted({(line.part, line.held_out) for line in lines}):
        label = " ".join([part] * (part == REJECTED) + ["held out"] * held_out)
        if label and (runs == 1 or label in (REJECTED, "held out")):
            look = _look(plain._replace(part=part, held_out=held_out), runs, theme) | anyone
            mark = {"marker": "o", "markerfacecolor": theme.ink} if held_out and anyone else {}
            meant[label] = look | mark
    return [Line2D([], [], label=label, **look) for label, look in [*keys, *meant.items()]]


def _shortened(name: str) -> str:
    half = LONGEST // 2
    return name if len(name) <= LONGEST else f"{name[: half - 1]}…{name[-half:]}"
