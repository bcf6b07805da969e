"""The report page: one file, all text escaped, every figure, curve and sample present."""

import json
import math
import re
from base64 import b64encode
from hashlib import sha256
from html import unescape

from mlx_dpo.reporting.curves import CURVES, make_charts
from mlx_dpo.reporting.plots import MARKERS
from mlx_dpo.reporting.run_page import (
    MARKER_PATHS,
    Finding,
    KeyFigure,
    LiveStatus,
    RunDetails,
    SettingRow,
    render_live_page,
    render_run_page,
    render_sections,
)
from mlx_dpo.reporting.samples import EvaluationSamples, Sample, SampledText

ROWS = [{"step": n, "loss": 1 / n, "rewards/chosen": n / 7} for n in range(1, 5)]
ROWS.append({"step": 4, "eval_loss": 0.125})
RUN = RunDetails(
    name="run",
    state="finished",
    figures=[KeyFigure("loss", "0.693", "0.125", "held out")],
    facts=[("loss", "sigmoid")],
    changed=[SettingRow("beta", "0.5", "default: 0.1")],
    metrics={"step": "4", "loss": "0.1250"},
    warnings=["loss <diverges>"],
)


def render(runs=(RUN,), rows=(ROWS,)):
    return render_run_page(list(runs), make_charts(list(rows)), "step")


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page)[1])


def test_the_page_runs_only_its_own_script_and_loads_nothing():
    page = render()
    script = re.search(r"<script>(.*)</script>", page, re.DOTALL)[1]
    digest = b64encode(sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in unescape(page)
    assert page.count("<script") == 2 and "http" not in page.replace("http-equiv", "")
    for attribute in (" src=", "url(", "@import", " onclick", " onload", "style="):
        assert attribute not in page, attribute


def test_a_live_page_runs_only_what_has_its_servers_nonce():
    status = LiveStatus("training", "Training: step 1 of 4", 1, 4)
    page = render_live_page([RUN], [status], "step", nonce="abc")
    assert page.count('nonce="abc"') == page.count("<style") + page.count("<script nonce") == 2
    assert "Content-Security-Policy" not in page and "style=" not in page
    assert data_of(page)["isLive"] and data_of(page)["lines"] == []
    assert '<progress value="1" max="4"' in page and "Training: step 1 of 4" in page


def note_of(runs):
    page = render([RUN._replace(name=str(n)) for n in range(len(runs))], runs)
    return re.search(r'<p class="note">(Dotted.*?)</p>', page)[1]


def test_the_note_explains_the_line_styles_that_occur_and_no_others():
    """Means from 50 steps on, downsampling from 601, repeated markers from the ninth run."""
    rows = [{"step": n, "loss": (-1) ** n} for n in range(1, 602)]
    dotted = "Dotted: the value of the reference model, or of chance."
    mean = " Faint: every step; strong: trailing mean."
    click = " A click on a run hides its lines."
    assert note_of([rows[:49]]) == dotted
    assert note_of([rows[:600]]) == dotted + mean
    assert note_of([rows]) == (
        dotted + mean + " Runs of more than 600 steps are downsampled: a point is the mean of "
        "neighbouring steps."
    )
    assert note_of([rows[:3]] * 8) == dotted + click
    repeated = dotted + " Markers repeat after 8 runs, with other colours."
    assert note_of([rows[:3]] * 9) == repeated + click


def test_markup_in_every_text_from_outside_stays_text():
    tag = '</script><b>&"{{ 7 * 7 }}'
    text = SampledText(tag, is_cut=True)
    hostile = RunDetails(
        name=tag,
        state="finished",
        summary=tag,
        figures=[KeyFigure("loss", tag, tag, tag)],
        result=Finding("bad", tag),
        warnings=[tag],
        facts=[(tag, tag)],
        changed=[SettingRow(tag, tag, tag)],
        unchanged=[SettingRow(tag, tag, tag)],
        settings={tag: tag},
        metrics={tag: tag},
        evaluations=[{tag: tag}],
        samples=[EvaluationSamples(1, (Sample(tag, 1, text, text),))],
    )
    for runs in ([hostile], [hostile, RUN]):
        page = render(runs, [ROWS] * len(runs))
        assert "<b>" not in page and page.count("</script>") == 2
        assert data_of(page)["names"][0] == tag
        assert "&lt;/script&gt;&lt;b&gt;&amp;&#34;{{ 7 * 7 }}" in page
        assert "49" not in re.sub(r"<style>.*?</style>|<script.*", "", page, flags=re.DOTALL)


def test_every_curve_has_a_place_and_its_points_are_in_the_page():
    page = render()
    assert re.findall(r'data-chart="(.*?)"', page) == [curve.title for curve in CURVES]
    lines = {(line["chart"], line["heldOut"]): line for line in data_of(page)["lines"]}
    assert lines["Loss", False]["x"] == [1, 2, 3, 4]
    assert lines["Loss", False]["y"] == [1.0, 0.5, 0.333333, 0.25]
    assert lines["Loss", True]["y"] == [0.125] and lines["Loss", True]["smoothed"] is None
    assert lines["Rewards", False]["completion"] == "chosen" and len(lines) == 3


def test_values_that_json_has_no_number_for_are_gaps():
    rows = [{"step": n, "loss": y} for n, y in enumerate([1.0, math.nan, -math.inf], start=1)]
    [line] = data_of(render(rows=[rows]))["lines"]
    assert line["y"] == [1.0, None, None]


def test_the_results_come_first_and_the_machine_is_folded_away():
    page = render()
    order = [page.index(f'data-chart="{title}"') for title in ("Loss", "Margin", "Accuracy")]
    assert order == sorted(order) and order[-1] < page.index('data-chart="Rewards"')
    folded = page.index('<details id="machine">')
    assert all(
        page.index(f'data-chart="{name}"') > folded for name in ("Speed", "Memory", "Padding")
    )
    titles = {curve.title: curve for curve in CURVES}
    assert not any(titles[title].caption.startswith(title) for title in titles)


def test_figures_warnings_and_changed_settings_are_above_the_curves():
    head = render()[: render().index('id="curves"')]
    head = head[head.index("<header") :]
    assert '<span class="after">0.125</span> <span class="before">from 0.693</span>' in head
    assert "loss &lt;diverges&gt;" in head and "sigmoid" in head
    assert re.search(r"<code>beta</code></th><td>0.5 <small>default: 0.1</small>", head)


def test_the_table_of_several_runs_has_every_cell_under_its_heading():
    other = RUN._replace(name="other", settings={"beta": "0.5"}, metrics={"step": "4"})
    page = render([RUN, other], [ROWS, ROWS])
    table = page[page.index('<table class="runs">') : page.index("</table>")]
    rows = [
        [re.sub(r"<.*?>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
        for row in table.split("<tr>")[1:]
    ]
    assert rows == [
        ["", "settings that differ", "on held-out pairs"],
        ["run", "beta", "loss", "step"],
        ["run", "", "0.1250", "4"],
        ["other", "0.5", "", "4"],
    ]


def test_the_last_samples_are_open_and_earlier_ones_folded():
    def item(step, text):
        sample = Sample("Why?", 3, SampledText("", False), SampledText(text, True))
        return EvaluationSamples(step, (sample,))

    page = render_sections([RUN._replace(samples=[item(10, "old"), item(20, "new")])], [])[
        "samples"
    ]
    folded = page.index("<details")
    assert page.index("new") < folded < page.index("old")
    assert "(empty)" in page and "cut at the token limit" in page and "turn 3" in page


def test_every_marker_has_a_shape():
    assert len(set(MARKER_PATHS)) == len(MARKER_PATHS) == len(MARKERS)
