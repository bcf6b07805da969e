"""Claims and their bounds, rows in CSV files, numbers as text, and the style of pictures."""

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from mlx_dpo.reporting.plots import DARK, LIGHT
from scripts.studies import NAMES, load_study
from scripts.studies.reporting import command, csv_rows
from scripts.studies.reporting.figures import (
    add_axes,
    add_legend,
    draw_picture,
    draw_spread,
    spread_over,
)
from scripts.studies.reporting.formats import (
    format_bound,
    format_duration,
    format_number,
    strip_markdown,
)
from scripts.studies.reporting.study import (
    Claim,
    Finding,
    Picture,
    Study,
    check_claims,
    column,
    distinct,
    of,
)

ROWS = [
    {"seed": seed, "method": method, "x": x, "y": 10.0 * seed + x}
    for seed in (0, 1)
    for method in ("a", "b")
    for x in (1, 2)
]


def make_claim(**values):
    defaults = {"name": "c", "text": "t", "source": "s", "measure": lambda rows: rows[0]["y"]}
    return Claim(**defaults | values)


def make_study(*claims, **values):
    texts = {"name": "s", "title": "T", "result": "R.", "question": "Q?", "setup": "S."}
    return Study(run=lambda scale: ROWS, claims=claims, **texts | values)


@pytest.mark.parametrize(
    ("values", "holds"),
    [
        ((0.5,), True),
        ((0.5, 0.6), True),
        ((0.5, 1.0), False),  # every seed has to keep the bound, which is not part of it
        ((0.0,), False),
        ((math.nan,), False),
        ((math.inf,), False),
    ],
)
def test_a_claim_holds_if_every_number_is_within_its_bounds(values, holds):
    assert Finding(make_claim(above=0, below=1), values).holds is holds


def test_a_number_that_is_nan_keeps_no_bound_not_even_an_open_one():
    assert not Finding(make_claim(), (math.nan,)).holds


def test_a_claim_is_checked_for_each_seed_or_for_all_at_once():
    study = make_study(
        make_claim(measure=lambda rows: len(rows)),
        make_claim(measure=lambda rows: len(rows), pooled=True),
        make_claim(full_only=True),
    )
    assert [finding.values for finding in check_claims(study, ROWS)][:2] == [(4, 4), (8,)]
    assert len(list(check_claims(study, ROWS))) == 3
    assert len(list(check_claims(study, ROWS, quick=True))) == 2


def test_rows_are_selected_by_columns():
    assert column(of(ROWS, seed=1, method="b"), "y") == [11, 12]
    assert distinct(ROWS, "method") == ["a", "b"]


def test_rows_are_read_as_they_were_written(tmp_path):
    row = {
        "seed": 0,
        "x": 0.123456789,
        "small": 1e-30,
        "none": math.inf,
        "tokens": 123456789,
        "numpy": np.int64(7),
        "is_best": True,
        "name": 'a, "b"',
        "commit": "12e4567",
        "other": "0123456",
        "empty": "",
    }
    csv_rows.write_rows(tmp_path / "new" / "x.csv", [row])
    [read] = csv_rows.read_rows(tmp_path / "new" / "x.csv")
    assert read == row | {"x": 0.123457, "is_best": 1}
    assert csv_rows.as_written([row]) == [read]
    assert (type(read["seed"]), type(read["small"])) == (int, float)


def test_a_number_that_is_nan_is_read_as_one(tmp_path):
    assert math.isnan(csv_rows.as_written([{"x": math.nan}])[0]["x"])


def test_rows_with_other_columns_are_refused(tmp_path):
    with pytest.raises(ValueError, match="y"):
        csv_rows.write_rows(tmp_path / "x.csv", [{"x": 1}, {"x": 1, "y": 2}])


def test_a_run_replaces_the_earlier_one_of_its_study(tmp_path):
    path = tmp_path / "runs.csv"
    for study, commit in (("b", "0000001"), ("a", "2"), ("b", "0000003")):
        csv_rows.record_run(path, {"study": study, "commit": commit})
    assert path.read_text() == "study,commit\na,2\nb,0000003\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1, "1"),
        (-0.5, "−0.5"),
        (12.345, "12.3"),
        (1234.5, "1,234"),
        (0.00999, "0.00999"),
        (0.0000275, "2.75\u00a0×\u00a010⁻⁵"),
        (-3e10, "−3\u00a0×\u00a010¹⁰"),
        (0.9999979, "0.9999979"),
        (0.99999999999, "1"),
        (0.987, "0.987"),
        (5e-301, "0"),
        (math.nan, "NaN"),
        (-math.inf, "−∞"),
    ],
)
def test_numbers_are_written_with_three_digits(value, text):
    assert format_number(value) == text


def test_bounds_and_durations_as_text():
    assert format_bound(make_claim(below=0.01)) == "<\u00a00.01"
    assert format_bound(make_claim(above=-0.5, below=2)) == ">\u00a0−0.5 and <\u00a02"
    assert format_bound(make_claim(below=1e-9)) == "<\u00a01\u00a0×\u00a010⁻⁹"
    assert [format_duration(s) for s in (7.6, 99, 100, 605)] == [
        "8 s", "99 s", "1 min 40 s", "10 min 5 s",
    ]  # fmt: skip


def test_markdown_becomes_plain_text():
    assert strip_markdown(r"π\*(y\|x) by `sft`, [a](b.md)") == "π*(y|x) by sft, a"


def test_a_line_is_the_mean_over_seeds_and_its_band_their_range():
    x, mean, low, high = spread_over(of(ROWS, method="a"), "x", "y")
    assert x.tolist() == [1, 2]
    assert (mean.tolist(), low.tolist(), high.tolist()) == ([6, 7], [1, 2], [11, 12])


def draw(figure, rows, theme):
    axes = add_axes(figure, 1, 1, 1, x_label="$x$", y_label="y (nats)", xscale="log", title="Panel")
    for index, method in enumerate(distinct(rows, "method")):
        draw_spread(axes, theme, index, of(rows, method=method), "x", "y", label=method)
    add_legend(figure)


def test_a_picture_is_the_same_file_again_and_another_one_in_the_dark():
    picture = Picture(name="p", caption="c", draw=draw, size=(4, 3))
    light, dark = (draw_picture(picture, ROWS, theme) for theme in (LIGHT, DARK))
    assert light == draw_picture(picture, ROWS, LIGHT) != dark
    assert ElementTree.fromstring(light).get("width") == "288pt"
    assert LIGHT.paper.encode() in light and DARK.paper.encode() in dark


def test_the_command_prints_claims_and_writes_rows(tmp_path, monkeypatch, capsys):
    study = make_study(
        make_claim(name="good", above=-1), make_claim(name="bad", text=r"of π\*", below=5)
    )
    monkeypatch.setattr("sys.argv", ["study", "--seeds", "0,1", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as status:
        command.main(study)
    output = capsys.readouterr().out
    assert status.value.code == 1
    assert "holds  good: 1, 11; bound >\u00a0−1\n" in output
    assert "FAILS  bad: 1, 11; bound <\u00a05\n       of π*\n" in output
    assert csv_rows.read_rows(tmp_path / "s.csv") == ROWS
    [run] = csv_rows.read_rows(tmp_path / "runs.csv")
    assert (run["study"], run["form"], run["seeds"]) == ("s", "full", "0 1")
    assert run["seconds"] >= 0 and run["peak_mb"] > 50


@pytest.mark.parametrize("name", NAMES)
def test_texts_of_a_study_are_complete(name):
    study = load_study(name)
    assert study.name == name
    names = [claim.name for claim in study.claims]
    assert len(set(names)) == len(names) and not any(re.search(r"\s|:", n) for n in names)
    for claim in study.claims:
        assert math.isfinite(claim.above) or math.isfinite(claim.below), claim.name
    texts = [study.question, study.setup, *study.deviations]
    texts += [picture.caption for picture in study.pictures]
    texts += [table.caption for table in study.tables]
    for text in texts:
        assert text.strip() == text and text.endswith((".", "?", ")")), text
        # Italics are closed, and the asterisk of an optimum is escaped.
        assert len(re.findall(r"(?<![\\*])\*(?!\*)", text)) % 2 == 0, text
        assert not re.search(r"<[A-Za-z/]", text), text  # HTML tags
    assert study.sources and study.claims
