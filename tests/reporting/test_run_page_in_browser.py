"""The report page in a browser, if one is installed."""

import base64

import pytest

from mlx_dpo.reporting.curves import make_charts
from mlx_dpo.reporting.plots import DARK, LIGHT
from mlx_dpo.reporting.run_page import render_run_page
from tests.reporting.test_run_page import ROWS, RUN
from tests.webdriver import CHROMIUM, DRIVER, browser

IMAGES = """
return [...document.images].map(image => [image.naturalWidth, image.width, image.currentSrc]);
"""


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with chromedriver on PATH")
@pytest.mark.parametrize(("name", "theme"), [("light", LIGHT), ("dark", DARK)])
def test_images_follow_the_browsers_theme_and_fit_a_phone(tmp_path, name, theme):
    path = tmp_path / "report.html"
    long = RUN._replace(facts=[("settings", "a_setting 0.001, " * 40)])
    path.write_text(render_run_page([long], make_charts([ROWS]), "step"), "utf-8")
    with browser(tmp_path / "profile") as window:
        feature = {"features": [{"name": "prefers-color-scheme", "value": name}]}
        phone = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        for command, values in (
            ("Emulation.setEmulatedMedia", feature),
            ("Emulation.setDeviceMetricsOverride", phone),
        ):
            window.call("POST", "/goog/cdp/execute", {"cmd": command, "params": values})
        window.open(path.as_uri())
        images = window.script(IMAGES)
        assert len(images) == 3
        for natural_width, width, source in images:
            assert natural_width > 0 and 0 < width <= 390
            assert theme.paper in base64.b64decode(source.partition(",")[2]).decode()
        assert window.script("return document.documentElement.scrollWidth") <= 390
        paper = window.script("return getComputedStyle(document.body).backgroundColor")
        red, green, blue = (int(theme.paper[i : i + 2], 16) for i in (1, 3, 5))
        assert paper == f"rgb({red}, {green}, {blue})"
