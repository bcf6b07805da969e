"""The page of iterative DPO: one self-contained file, in which all text is escaped."""

import re

from mlx_dpo import DPOConfig
from mlx_dpo.collect.iterative.folder import IterativeSettings
from mlx_dpo.collect.iterative.page import make_round_charts, render_loop_page
from tests.collect.test_iterative_report import BASE, FIRST, HEALTH

HOSTILE = "<script>alert(1)</script>"
CONFIG = DPOConfig(model=f"org/{HOSTILE}", output="loop", learning_rate=1e-3)
SETTINGS = IterativeSettings(prompts="prompts.txt", rounds=3, prompts_per_round=200)
SECOND = FIRST | {
    "round": 2,
    "health": HEALTH,
    "collapse": f"answers repeat themselves {HOSTILE}",
    "answers": [
        {"prompt": [{"role": "user", "content": HOSTILE}],
         "base": "old", "before": "older", "now": HOSTILE},
    ],
}  # fmt: skip


def render(*rounds):
    return render_loop_page(CONFIG, SETTINGS, f"judge {HOSTILE}", rounds)


def test_the_page_has_the_rounds_the_warnings_the_answers_and_the_settings():
    page = render(BASE, FIRST, SECOND)
    assert "<tr><th>round</th><td>base</td><td>1</td><td>2</td></tr>" in page
    assert "<tr><th>held-out reward</th><td>0.635</td><td>1.500</td><td>1.500</td></tr>" in page
    assert '<p class="note">2 of 3 rounds, judged by judge' in page
    assert re.findall("<summary>(.+)</summary>", page) == ["Round 2", "Round 1", "Base"]
    assert "bound the reward" in page
    assert "<tr><th>prompt</th><th>base</th><th>previous round</th><th>this round</th></tr>" in page
    assert "<tr><th>prompt</th><th>base</th><th>this round</th></tr>" in page  # of round 1
    assert "<td>200</td>" in page
    assert "learning_rate 0.001" in page


def test_the_page_runs_nothing_and_loads_nothing():
    page = render(BASE, FIRST, SECOND)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 6
    [policy] = re.findall('Content-Security-Policy" content="(.+?)"', page)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert set(re.findall('(?:src|srcset)="(.{5})', page)) == {"data:"}


def test_a_chart_shows_the_rounds_that_have_its_figure():
    charts = {
        chart.curve.title: chart.lines[0] for chart in make_round_charts([BASE, FIRST, SECOND])
    }
    assert list(charts) == [
        "Win rate against base", "Held-out reward", "Answer length", "KL from base",
        "4-gram repetition", "Judged pairs",
    ]  # fmt: skip
    assert (charts["Win rate against base"].x, charts["Win rate against base"].y) == (
        [1.0, 2.0],
        [0.75, 0.75],
    )
    assert charts["Held-out reward"].y == [0.6351, 1.5, 1.5]
    assert charts["KL from base"].x == [2.0]
    assert make_round_charts([BASE])[0].curve.title == "Held-out reward"
