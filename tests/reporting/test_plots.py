"""Pictures: what is drawn, and that it can be read in both themes and without colours."""

import io
from itertools import product
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from mlx_dpo.reporting import plots as drawing
from mlx_dpo.reporting.curves import CHOSEN, REJECTED, Chart, Line, charts
from mlx_dpo.reporting.plots import ABOVE, DARK, DOTS, HIGH, LIGHT, WIDE

COLOURS = {"color", "markerfacecolor"}
ROWS = [
    {"step": n, "loss": 1 / n, "rewards/chosen": 0.1 * n, "rewards/rejected": -0.2 * n}
    for n in range(1, 9)
]
ROWS.insert(4, {"step": 4, "eval_loss": 0.3, "eval_rewards/chosen": 1, "eval_rewards/rejected": -1})
RUNS = [ROWS, ROWS[:4]]


def line(run=0, part="", held_out=False):
    return Line(run, part, held_out, x=(1.0, 2.0), y=(3.0, 4.0), mean=(3.0, 3.5))


def axes_of(chart, runs):
    axes = drawing._figure(WIDE, HIGH).add_subplot()
    drawing._draw(axes, chart, runs, "step", LIGHT)
    return axes


def test_a_line_goes_through_the_mean_and_each_step_shows_faintly_behind_it():
    faint, strong = axes_of(Chart("Loss", "", "", None, [line()]), 1).lines
    assert faint.get_xydata().tolist() == [[1, 3], [2, 4]] and faint.get_alpha() < 0.5
    assert strong.get_xydata().tolist() == [[1, 3], [2, 3.5]] and strong.get_alpha() is None


def test_a_single_step_is_a_hollow_mark_and_a_single_evaluation_a_filled_one():
    step, held_out = (
        line(held_out=held_out)._replace(x=(1.0,), y=(3.0,), mean=(3.0,))
        for held_out in (False, True)
    )
    drawn = axes_of(Chart("Loss", "", "", None, [step, held_out]), 1).lines
    assert [one.get_marker() for one in drawn] == ["o", "o"]
    assert [one.get_markerfacecolor() for one in drawn] == [LIGHT.paper, LIGHT.colours[0]]
    many = axes_of(Chart("Loss", "", "", None, [line()]), 1).lines
    assert {one.get_marker() for one in many} <= {"", "None"}


def test_the_level_of_nothing_learnt_is_drawn_and_what_cannot_be_negative_starts_at_zero():
    chart = Chart("Margin", "", "", 0.25, [line()], from_zero=True)
    axes = axes_of(chart, 1)
    assert axes.lines[0].get_ydata() == [0.25, 0.25]
    assert axes.get_ylim()[0] == 0 < 4 < axes.get_ylim()[1]
    flat = Chart("Padding", "", "", None, [line()._replace(y=(0, 0), mean=(0, 0))], from_zero=True)
    assert axes_of(flat, 1).get_ylim() == (0, 1)
    same = Chart("Memory", "", "", None, [line()._replace(y=(2, 2), mean=(2, 2))], from_zero=True)
    assert axes_of(same, 1).get_ylim() == (0, pytest.approx(2.1))


@pytest.mark.parametrize("runs", [1, 2, 8])
def test_lines_are_told_apart_by_shape_alone(runs):
    """Filled or hollow is a shape as well: it is seen without colours."""
    seen = set()
    for run, part, held_out in product(range(runs), (CHOSEN, REJECTED), (False, True)):
        look = drawing._look(line(run, part, held_out), runs, LIGHT)
        filled = look["markerfacecolor"] == look["color"]
        shape = tuple((k, str(v)) for k, v in look.items() if k not in COLOURS)
        seen.add((*shape, filled and bool(look["marker"])))
    assert len(seen) == 4 * runs


def luminance(colour):
    """WCAG 2's relative luminance."""
    values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_lines_and_text_stand_out_from_the_paper(theme):
    """WCAG 2 asks 3 of graphics (1.4.11) and 7 of text (1.4.6)."""
    assert contrast("#000000", "#ffffff") == 21
    assert min(contrast(colour, theme.paper) for colour in theme.colours) >= 3
    assert contrast(theme.ink, theme.paper) >= 7
    assert len(set(theme.colours)) == len(theme.colours) == len(drawing.MARKS)


def labels(runs, names):
    lines = [line for chart in charts(runs) for line in chart.lines]
    return [key.get_label() for key in drawing._keys(lines, names, LIGHT)]


def test_the_legend_names_what_there_is_and_nothing_else():
    assert labels([ROWS], ["a"]) == ["train", "held out", "rejected", "rejected held out"]
    assert labels(RUNS, ["a", "b"]) == ["a", "b", "held out", "rejected"]
    assert labels([[{"step": 1, "loss": 1.0}]], ["a"]) == ["train"]
    names = ["rejected", "held out"]  # of runs
    assert labels(RUNS, names) == [*names, "held out", "rejected"]
    long = [f"{letter * 300}{number}" for letter in "ab" for number in range(2)]
    shown = labels([ROWS] * 4, long)[:4]
    assert len(set(shown)) == 4 and max(map(len, shown)) == drawing.LONGEST


def drawn_legend(names):
    figure = drawing._figure(2 * WIDE, HIGH)
    keys = drawing._keys([line()], names, LIGHT)
    with drawing._style(LIGHT):
        return drawing._legend(figure, keys, "center left"), figure


@pytest.mark.parametrize(("letters", "columns"), [(3, 4), (25, 3), (40, 2), (75, 1), (500, 1)])
def test_a_legend_has_as_many_columns_as_there_is_room_for(letters, columns):
    drawn, figure = drawn_legend([f"{number:n>{letters}}" for number in range(12)])
    assert drawn._ncols == columns and len(figure.legends) == 1
    assert drawn.get_window_extent().width <= figure.bbox.width


def test_names_are_drawn_as_they_are():
    """Between dollars matplotlib sets formulas, and fails at what is none."""
    names = ["a$b$", r"c$\frac{", "x_1", "_hidden"]
    drawn, _ = drawn_legend(names)
    assert [text.get_text() for text in drawn.get_texts()] == names
    assert not any(text.get_parse_math() for text in drawn.get_texts())
    svg = drawing.legend(charts([ROWS] * 4), names, LIGHT).decode()
    assert all(f"<!-- {name} -->" in svg for name in names)


def test_a_matplotlibrc_of_the_reader_changes_no_picture():
    import matplotlib

    shown = charts([ROWS])
    before = drawing.png(shown, ["a"], "step"), drawing.svg(shown[0], 1, "step", DARK)
    theirs = {"text.usetex": True, "savefig.bbox": "tight", "figure.dpi": 50, "font.size": 30}
    with matplotlib.rc_context(theirs):
        assert before == (
            drawing.png(shown, ["a"], "step"),
            drawing.svg(shown[0], 1, "step", DARK),
        )
        assert matplotlib.rcParams["font.size"] == 30


def test_many_runs_have_no_two_looks_alike():
    """Of more than eight, marks and colours tell them apart together."""
    count = len(drawing.MARKS) * len(LIGHT.colours)
    looks = [drawing._look(line(run), count, LIGHT) for run in range(count)]
    assert len({(look["marker"], look["color"]) for look in looks}) == count


def test_a_png_is_as_large_as_its_charts_on_white_and_says_nothing_of_its_making():
    shown = charts([ROWS])
    content = drawing.png(shown, ["a"], "step")
    picture = Image.open(io.BytesIO(content))
    assert len(shown) == 2
    assert picture.size == (round(2 * WIDE * DOTS), round((HIGH + ABOVE) * DOTS))
    assert set(picture.info) <= {"dpi"}
    pixels = np.asarray(picture.convert("RGB"))
    assert (pixels[0] == 255).all() and (pixels < 100).any()
    assert content == drawing.png(shown, ["a"], "step")


def test_many_names_take_no_room_from_the_charts():
    names = [f"{number:a>40}" for number in range(100)]
    picture = Image.open(io.BytesIO(drawing.png(charts([ROWS] * 100), names, "step")))
    drawn, figure = drawn_legend(names)
    lines = drawn.get_window_extent().height / figure.dpi
    assert lines > 2 * HIGH and picture.size[1] == pytest.approx((HIGH + lines) * DOTS, rel=0.05)


def test_an_svg_has_the_colours_of_its_theme_and_draws_by_itself():
    chart = charts(RUNS)[0]
    for theme, other in ((LIGHT, DARK), (DARK, LIGHT)):
        text = drawing.svg(chart, 2, "step", theme).decode()
        root = ElementTree.fromstring(text)
        assert root.tag.endswith("svg") and "<image" not in text and "<script" not in text
        assert theme.paper in text and theme.colours[0] in text and theme.colours[1] in text
        assert other.paper not in text and other.colours[0] not in text


def test_names_that_are_no_latin_are_drawn_without_complaint(recwarn):
    """Where a font for them is missing, matplotlib says so, and says it once."""
    drawing.legend(charts(RUNS), ["naïve ± β", "Ω"], LIGHT)
    assert not recwarn.list
