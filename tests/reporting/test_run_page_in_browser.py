"""The report page in a browser, if one is installed."""

import pytest

from mlx_dpo.reporting.curves import make_charts
from mlx_dpo.reporting.plots import DARK, LIGHT
from mlx_dpo.reporting.run_page import render_run_page
from tests.reporting.test_run_page import ROWS, RUN
from tests.webdriver import CHROMIUM, DRIVER, browser

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium with chromedriver on PATH"
)
NARROW = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
TEXT_SIZES = """
const sizes = [...document.querySelectorAll('body *')]
  .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()))
  .filter(e => e.checkVisibility() && !['SCRIPT', 'STYLE'].includes(e.tagName))
  .map(e => parseFloat(getComputedStyle(e).fontSize)
            * (e.ownerSVGElement ? e.ownerSVGElement.getBoundingClientRect().width
                                   / e.ownerSVGElement.viewBox.baseVal.width : 1));
return Math.min(...sizes);
"""
DRAWN = "return document.querySelectorAll('figure:not([hidden]) .plot svg path.line').length"


def emulate(window, command, values):
    window.call("POST", "/goog/cdp/execute", {"cmd": f"Emulation.{command}", "params": values})


@pytest.mark.parametrize(("name", "theme"), [("light", LIGHT), ("dark", DARK)])
def test_the_page_follows_the_theme_and_is_legible_on_a_phone(tmp_path, name, theme):
    path = tmp_path / "report.html"
    long = RUN._replace(
        facts=[("settings", "a_setting 0.001, " * 40)],
        evaluations=[{f"metric number {n}": "0.123" for n in range(12)}],
    )
    path.write_text(render_run_page([long], make_charts([ROWS]), "step"), "utf-8")
    with browser(tmp_path / "profile") as window:
        feature = {"features": [{"name": "prefers-color-scheme", "value": name}]}
        emulate(window, "setEmulatedMedia", feature)
        emulate(window, "setDeviceMetricsOverride", NARROW)
        window.open(path.as_uri())
        assert window.wait_for(DRAWN) == 3
        assert window.script("return document.documentElement.scrollWidth") <= 390
        assert window.script(TEXT_SIZES) >= 11
        width = "return document.querySelector('#evaluations .wide').scrollWidth"
        assert window.script(width) > 390  # the table scrolls inside its box
        paper = window.script("return getComputedStyle(document.body).backgroundColor")
        red, green, blue = (int(theme.paper[i : i + 2], 16) for i in (1, 3, 5))
        assert paper == f"rgb({red}, {green}, {blue})"
        assert window.messages() == []


def test_values_are_read_by_pointer_keyboard_and_table(tmp_path):
    path = tmp_path / "report.html"
    runs = [RUN, RUN._replace(name="<other>")]
    page = render_run_page(runs, make_charts([ROWS, ROWS[:2]]), "step")
    path.write_text(page, "utf-8")
    tooltip = "return document.querySelector('#tooltip:not([hidden])')?.innerText ?? ''"
    with browser(tmp_path / "profile") as window:
        window.open(path.as_uri())
        window.wait_for(DRAWN)
        window.hover("figure[data-chart=Loss] .plot", 0.02)
        lines = window.wait_for(tooltip).split("\n")
        assert lines[0] == "step 1" and lines.count("1") == 2 and "<other>" in lines
        window.script("document.querySelector('figure[data-chart=Loss] .plot').focus()")
        window.press("\ue014", "\ue014", "\ue012")  # right, right, left
        assert window.script(tooltip).split("\n")[0] == "step 2"
        window.press("\ue00c")  # Escape
        assert window.script(tooltip) == ""
        window.script("document.querySelector('figure[data-chart=Loss] .values').open = true")
        table = "return document.querySelector('figure[data-chart=Loss] table')?.innerText"
        rows = [row.split("\t") for row in window.wait_for(table).split("\n")]
        assert rows[0] == ["step", "run", "run, held out", "<other>"]
        assert rows[2] == ["2", "0.5000", "", "0.5000"] and rows[4][:3] == ["4", "0.2500", "0.1250"]
        label = window.script(
            "return document.querySelector('figure[data-chart=Loss] .plot').ariaLabel"
        )
        assert label.startswith("Loss. run: from 1 to 0.2500; run, held out: from 0.1250")
        # Hiding a run leaves the lines of the other one.
        before = window.script(DRAWN)
        window.script("document.querySelector('.legend button[data-run=\"1\"]').click()")
        window.wait_for(f"{DRAWN} === {before - 2}")
        assert window.messages() == []
