"""The page of runs: nothing from elsewhere, nothing of a stranger acts, the figures are there."""

import base64
import re
from xml.etree import ElementTree

from mlx_dpo.reporting.curves import charts
from mlx_dpo.reporting.plots import DARK, LIGHT
from mlx_dpo.reporting.run_page import Told, run_page

ROWS = [{"step": n, "loss": 1 / n, "rewards/chosen": n / 7} for n in range(1, 5)]
ROWS.append({"step": 4, "eval_loss": 0.125})
RUN = Told("run", [("loss", "sigmoid")], {"step": "4", "loss": "0.1250"}, ["it <diverges>"])


def text_of(page):
    return re.sub(r"data:image[^\"]*", "", page)


def test_the_page_asks_nothing_of_the_network_and_runs_nothing():
    page = text_of(run_page([RUN], charts([ROWS]), "step"))
    assert "http" not in page.replace('http-equiv="Content-Security-Policy"', "")
    assert "default-src 'none'" in page and "<script" not in page


def noted(runs):
    told = [RUN._replace(name=str(n)) for n in range(len(runs))]
    return re.search(r'<p class="note">(.*?)</p>', run_page(told, charts(runs), "step"))[1]


def test_the_note_says_what_is_in_the_pictures_and_no_more():
    """A mean from 50 steps on, neighbours as one from 601 on, marks again from the ninth run on."""
    rows = [{"step": n, "loss": (-1) ** n} for n in range(1, 602)]
    dotted = "Dotted: where the reference itself would be, or a coin."
    mean = " Faint: each step; strong: the mean of it and of those before it."
    assert noted([rows[:49]]) == dotted
    assert noted([rows[:600]]) == dotted + mean
    thinned = dotted + mean + " Of more than 600 steps, neighbours are one, their mean."
    assert noted([rows]) == thinned
    assert noted([rows[:3]] * 8) == dotted
    again = dotted + " Marks repeat after 8 runs, then in other colours."
    assert noted([rows[:3]] * 9) == again


def test_names_and_facts_are_text():
    evil = RUN._replace(name="<b>&", facts=[("<i>", "</table>")], figures={"<u>": "<s>"})
    page = text_of(run_page([evil, RUN], charts([ROWS, ROWS]), "step"))
    for tag in ("<b>", "<i>", "<u>", "<s>", "<diverges>"):
        assert tag not in page
    assert "&lt;b&gt;&amp;" in page and "&lt;/table&gt;" in page and "it &lt;diverges&gt;" in page


def test_every_picture_is_there_in_both_themes_and_in_words():
    page = run_page([RUN], charts([ROWS]), "step")
    sources = re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page)
    pictures = [base64.b64decode(source).decode() for source in sources]
    assert len(pictures) == 2 * (1 + 2)  # a legend, loss and rewards
    for dark, light in zip(pictures[::2], pictures[1::2], strict=True):
        ElementTree.fromstring(dark)
        assert DARK.paper in dark and LIGHT.paper in light
    assert page.count('media="(prefers-color-scheme: dark)" srcset=') == 3
    assert 'alt="Loss. run: from 1 to 0.25. run, held out: from 0.125 to 0.125"' in page
    assert 'alt="Rewards. run, chosen: from 0.1429 to 0.5714"' in page


def test_figures_of_several_runs_stand_under_each_other_where_they_belong():
    other = RUN._replace(name="other", figures={"beta": "0.5", "step": "4"})
    page = text_of(run_page([RUN, other], charts([ROWS, ROWS]), "step"))
    table = page[page.index("<table>") : page.index("</table>")]
    rows = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in table.split("<tr>")[1:]]
    assert rows == [
        ["on held-out pairs", "step", "loss", "beta"],
        ["run", "4", "0.1250", ""],
        ["other", "4", "", "0.5"],
    ]
