"""The report page: self-contained, all text escaped, every metric and chart present."""

import base64
import re
from xml.etree import ElementTree

from mlx_dpo.reporting.curves import make_charts
from mlx_dpo.reporting.plots import DARK, LIGHT
from mlx_dpo.reporting.run_page import RunDetails, render_run_page

ROWS = [{"step": n, "loss": 1 / n, "rewards/chosen": n / 7} for n in range(1, 5)]
ROWS.append({"step": 4, "eval_loss": 0.125})
RUN = RunDetails(
    name="run",
    facts=[("loss", "sigmoid")],
    settings={},
    metrics={"step": "4", "loss": "0.1250"},
    warnings=["loss <diverges>"],
)


def without_images(page):
    return re.sub(r"data:image[^\"]*", "", page)


def test_the_page_loads_only_its_own_images_and_runs_nothing():
    page = without_images(render_run_page([RUN], make_charts([ROWS]), "step"))
    assert "http" not in page.replace('http-equiv="Content-Security-Policy"', "")
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\"" in page
    assert "<script" not in page


def note_of(runs):
    details = [RUN._replace(name=str(n)) for n in range(len(runs))]
    page = render_run_page(details, make_charts(runs), "step")
    return re.search(r'<p class="note">(.*?)</p>', page)[1]


def test_the_note_explains_the_line_styles_that_occur_and_no_others():
    """Means from 50 steps on, downsampling from 601, repeated markers from the ninth run."""
    rows = [{"step": n, "loss": (-1) ** n} for n in range(1, 602)]
    dotted = "Dotted: the value of the reference model, or of chance."
    mean = " Faint: every step; strong: trailing mean."
    assert note_of([rows[:49]]) == dotted
    assert note_of([rows[:600]]) == dotted + mean
    assert note_of([rows]) == (
        dotted + mean + " Runs of more than 600 steps are downsampled: a point is the mean of "
        "neighbouring steps."
    )
    assert note_of([rows[:3]] * 8) == dotted
    repeated = dotted + " Markers repeat after 8 runs, with other colours."
    assert note_of([rows[:3]] * 9) == repeated


def test_markup_in_names_facts_and_warnings_stays_text():
    hostile = RUN._replace(
        name='<b>&"{{ 7 * 7 }}', facts=[("<i>", "</table>")], metrics={"<u>": "<s>"}
    )
    page = without_images(render_run_page([hostile, RUN], make_charts([ROWS, ROWS]), "step"))
    for tag in ("<b>", "<i>", "<u>", "<s>", "<diverges>"):
        assert tag not in page
    assert "&lt;b&gt;&amp;&#34;{{ 7 * 7 }}" in page and "&lt;/table&gt;" in page
    assert "loss &lt;diverges&gt;" in page


def test_every_chart_is_there_in_both_themes_and_in_words():
    page = render_run_page([RUN], make_charts([ROWS]), "step")
    sources = re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page)
    pictures = [base64.b64decode(source).decode() for source in sources]
    assert len(pictures) == 2 * (1 + 2)  # legend, loss and rewards
    for dark, light in zip(pictures[::2], pictures[1::2], strict=True):
        ElementTree.fromstring(dark)
        assert DARK.paper in dark and LIGHT.paper in light
    assert page.count('media="(prefers-color-scheme: dark)" srcset=') == 3
    assert 'alt="Loss. run: from 1 to 0.25. run, held out: from 0.125 to 0.125"' in page
    assert 'alt="Rewards. run, chosen: from 0.1429 to 0.5714"' in page


def test_the_table_of_several_runs_has_every_cell_under_its_heading():
    other = RUN._replace(name="other", settings={"beta": "0.5"}, metrics={"step": "4"})
    page = without_images(render_run_page([RUN, other], make_charts([ROWS, ROWS]), "step"))
    table = page[page.index("<table>") : page.index("</table>")]
    rows = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in table.split("<tr>")[1:]]
    assert rows == [
        ["on held-out pairs", "step", "loss", "beta"],
        ["run", "4", "0.1250", ""],
        ["other", "4", "", "0.5"],
    ]
