"""The page of runs as a browser shows it, where there is one."""

import base64

import pytest

from mlx_dpo.reporting.curves import charts
from mlx_dpo.reporting.plots import DARK, LIGHT
from mlx_dpo.reporting.run_page import run_page
from tests.reporting.test_run_page import ROWS, RUN
from tests.webdriver import CHROMIUM, DRIVER, browser

SHOWN = """
return [...document.images].map(image => [image.naturalWidth, image.width, image.currentSrc]);
"""


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with chromedriver on PATH")
@pytest.mark.parametrize(("name", "theme"), [("light", LIGHT), ("dark", DARK)])
def test_pictures_show_in_the_theme_of_the_reader_and_fit_a_phone(tmp_path, name, theme):
    path = tmp_path / "report.html"
    long = RUN._replace(facts=[("settings", "a_setting 0.001, " * 40)])
    path.write_text(run_page([long], charts([ROWS]), "step"), "utf-8")
    with browser(tmp_path / "profile") as found:
        feature = {"features": [{"name": "prefers-color-scheme", "value": name}]}
        phone = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        for command, values in (
            ("Emulation.setEmulatedMedia", feature),
            ("Emulation.setDeviceMetricsOverride", phone),
        ):
            found.call("POST", "/goog/cdp/execute", {"cmd": command, "params": values})
        found.open(path.as_uri())
        images = found.script(SHOWN)
        assert len(images) == 3
        for natural, shown, source in images:
            assert natural > 0 and 0 < shown <= 390
            assert theme.paper in base64.b64decode(source.partition(",")[2]).decode()
        assert found.script("return document.documentElement.scrollWidth") <= 390
        paper = found.script("return getComputedStyle(document.body).backgroundColor")
        red, green, blue = (int(theme.paper[i : i + 2], 16) for i in (1, 3, 5))
        assert paper == f"rgb({red}, {green}, {blue})"
