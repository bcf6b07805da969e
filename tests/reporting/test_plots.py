"""Drawn charts: the right lines, readable in both themes and without colours."""

import io
from itertools import product
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from mlx_dpo.reporting import plots
from mlx_dpo.reporting.curves import CHOSEN, REJECTED, Chart, Curve, Line, make_charts
from mlx_dpo.reporting.plots import CHART_HEIGHT, CHART_WIDTH, DARK, DPI, LIGHT, MIN_LEGEND_HEIGHT

COLOURS = {"color", "markerfacecolor"}
ROWS = [
    {"step": n, "loss": 1 / n, "rewards/chosen": 0.1 * n, "rewards/rejected": -0.2 * n}
    for n in range(1, 9)
]
ROWS.insert(4, {"step": 4, "eval_loss": 0.3, "eval_rewards/chosen": 1, "eval_rewards/rejected": -1})
RUNS = [ROWS, ROWS[:4]]


def make_line(run=0, completion="", held_out=False):
    return Line(run, completion, held_out, x=(1.0, 2.0), y=(3.0, 4.0), smoothed=(3.0, 3.5))


def axes_of(chart, runs):
    axes = plots.make_figure(CHART_WIDTH, CHART_HEIGHT).add_subplot()
    plots._draw_chart(axes, chart, runs, "step", LIGHT)
    return axes


def test_the_smoothed_line_is_strong_and_the_steps_are_faint():
    faint, strong = axes_of(Chart(Curve("Loss", "", "", {}, None), [make_line()]), 1).lines
    assert faint.get_xydata().tolist() == [[1, 3], [2, 4]] and faint.get_alpha() < 0.5
    assert strong.get_xydata().tolist() == [[1, 3], [2, 3.5]] and strong.get_alpha() is None


def test_a_single_step_is_a_hollow_marker_and_a_single_evaluation_a_filled_one():
    step, held_out = (
        make_line(held_out=held_out)._replace(x=(1.0,), y=(3.0,), smoothed=(3.0,))
        for held_out in (False, True)
    )
    lines = axes_of(Chart(Curve("Loss", "", "", {}, None), [step, held_out]), 1).lines
    assert [line.get_marker() for line in lines] == ["o", "o"]
    assert [line.get_markerfacecolor() for line in lines] == [LIGHT.paper, LIGHT.colours[0]]
    longer = axes_of(Chart(Curve("Loss", "", "", {}, None), [make_line()]), 1).lines
    assert {line.get_marker() for line in longer} <= {"", "None"}


def test_the_baseline_is_drawn_and_nonnegative_metrics_start_at_zero():
    chart = Chart(Curve("Margin", "", "", {}, 0.25, starts_at_zero=True), [make_line()])
    axes = axes_of(chart, 1)
    assert axes.lines[0].get_ydata() == [0.25, 0.25]
    assert axes.get_ylim()[0] == 0 < 4 < axes.get_ylim()[1]
    zeros, twos = (make_line()._replace(y=y, smoothed=y) for y in ((0, 0), (2, 2)))
    flat = Chart(Curve("Padding", "", "", {}, None, starts_at_zero=True), [zeros])
    assert axes_of(flat, 1).get_ylim() == (0, 1)
    constant = Chart(Curve("Memory", "", "", {}, None, starts_at_zero=True), [twos])
    assert axes_of(constant, 1).get_ylim() == (0, pytest.approx(2.1))


@pytest.mark.parametrize("runs", [1, 2, 8])
def test_lines_can_be_distinguished_without_colours(runs):
    """A filled and a hollow marker differ without colours."""
    styles = set()
    for run, completion, held_out in product(range(runs), (CHOSEN, REJECTED), (False, True)):
        style = plots._line_style(make_line(run, completion, held_out), runs, LIGHT)
        is_filled = style["markerfacecolor"] == style["color"]
        shape = tuple((k, str(v)) for k, v in style.items() if k not in COLOURS)
        styles.add((*shape, is_filled and bool(style["marker"])))
    assert len(styles) == 4 * runs


def luminance(colour):
    """Return the relative luminance of WCAG 2."""
    values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_lines_and_text_have_enough_contrast(theme):
    """WCAG 2 requires a contrast of 3 for graphics (1.4.11) and 7 for text (1.4.6)."""
    assert contrast("#000000", "#ffffff") == 21
    assert min(contrast(colour, theme.paper) for colour in theme.colours) >= 3
    assert contrast(theme.ink, theme.paper) >= 7
    assert len(set(theme.colours)) == len(theme.colours) == len(plots.MARKERS)


def legend_labels(runs, names):
    lines = [line for chart in make_charts(runs) for line in chart.lines]
    return [handle.get_label() for handle in plots._legend_handles(lines, names, LIGHT)]


def test_the_legend_has_an_entry_for_everything_drawn_and_no_other():
    assert legend_labels([ROWS], ["a"]) == ["train", "held out", "rejected", "rejected held out"]
    assert legend_labels(RUNS, ["a", "b"]) == ["a", "b", "held out", "rejected"]
    assert legend_labels([[{"step": 1, "loss": 1.0}]], ["a"]) == ["train"]
    names = ["rejected", "held out"]  # of runs
    assert legend_labels(RUNS, names) == [*names, "held out", "rejected"]
    long = [f"{letter * 300}{number}" for letter in "ab" for number in range(2)]
    shortened = legend_labels([ROWS] * 4, long)[:4]
    assert len(set(shortened)) == 4 and max(map(len, shortened)) == plots.MAX_NAME_LENGTH


def draw_legend(names):
    figure = plots.make_figure(2 * CHART_WIDTH, CHART_HEIGHT)
    handles = plots._legend_handles([make_line()], names, LIGHT)
    with plots.matplotlib_style(LIGHT):
        return plots._add_legend(figure, handles, "center left"), figure


@pytest.mark.parametrize(("letters", "columns"), [(3, 4), (25, 3), (40, 2), (75, 1), (500, 1)])
def test_a_legend_has_as_many_columns_as_fit(letters, columns):
    legend, figure = draw_legend([f"{number:n>{letters}}" for number in range(12)])
    assert legend._ncols == columns and len(figure.legends) == 1
    assert legend.get_window_extent().width <= figure.bbox.width


def test_names_are_drawn_literally():
    """By default matplotlib reads text between dollar signs as a formula and may raise."""
    names = ["a$b$", r"c$\frac{", "x_1", "_hidden"]
    legend, _ = draw_legend(names)
    assert [text.get_text() for text in legend.get_texts()] == names
    assert not any(text.get_parse_math() for text in legend.get_texts())


def test_the_users_matplotlibrc_has_no_effect():
    import matplotlib

    charts = make_charts([ROWS])
    before = plots.charts_png(charts, ["a"], "step"), plots.chart_svg(charts[0], 1, "step", DARK)
    user_settings = {
        "text.usetex": True,
        "savefig.bbox": "tight",
        "figure.dpi": 50,
        "font.size": 30,
    }
    with matplotlib.rc_context(user_settings):
        assert before == (
            plots.charts_png(charts, ["a"], "step"),
            plots.chart_svg(charts[0], 1, "step", DARK),
        )
        assert matplotlib.rcParams["font.size"] == 30


def test_many_runs_have_different_styles():
    """More than eight runs differ by the combination of marker and colour."""
    count = len(plots.MARKERS) * len(LIGHT.colours)
    styles = [plots._line_style(make_line(run), count, LIGHT) for run in range(count)]
    assert len({(style["marker"], style["color"]) for style in styles}) == count


def test_a_png_is_white_and_deterministic_and_has_no_metadata():
    charts = make_charts([ROWS])
    content = plots.charts_png(charts, ["a"], "step")
    picture = Image.open(io.BytesIO(content))
    assert len(charts) == 2
    assert picture.size == (
        round(2 * CHART_WIDTH * DPI),
        round((CHART_HEIGHT + MIN_LEGEND_HEIGHT) * DPI),
    )
    assert set(picture.info) <= {"dpi"}
    pixels = np.asarray(picture.convert("RGB"))
    assert (pixels[0] == 255).all() and (pixels < 100).any()
    assert content == plots.charts_png(charts, ["a"], "step")


def test_a_large_legend_does_not_shrink_the_charts():
    names = [f"{number:a>40}" for number in range(100)]
    picture = Image.open(io.BytesIO(plots.charts_png(make_charts([ROWS] * 100), names, "step")))
    legend, figure = draw_legend(names)
    legend_height = legend.get_window_extent().height / figure.dpi
    assert legend_height > 2 * CHART_HEIGHT and picture.size[1] == pytest.approx(
        (CHART_HEIGHT + legend_height) * DPI, rel=0.05
    )


def test_an_svg_has_the_colours_of_its_theme_and_loads_nothing():
    chart = make_charts(RUNS)[0]
    for theme, other in ((LIGHT, DARK), (DARK, LIGHT)):
        text = plots.chart_svg(chart, 2, "step", theme).decode()
        root = ElementTree.fromstring(text)
        assert root.tag.endswith("svg") and "<image" not in text and "<script" not in text
        assert theme.paper in text and theme.colours[0] in text and theme.colours[1] in text
        assert other.paper not in text and other.colours[0] not in text


def test_names_in_other_scripts_are_drawn_without_warnings(recwarn):
    """matplotlib warns once if it has no font for a character."""
    plots.charts_png(make_charts(RUNS), ["naïve ± β", "Ω"], "step")
    assert not recwarn.list
