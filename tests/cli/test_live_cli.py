"""`train --live` and `report --live`: in a browser while a run trains, and over HTTP."""

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner

from mlx_dpo.cli import cli
from tests.webdriver import CHROMIUM, DRIVER, browser

COMMAND = [sys.executable, "-c", "from mlx_dpo.cli import main; main()"]
TRAIN = ["train", "pairs.jsonl", "--model", "base", "--output", "run", "--epochs", "60", "--live"]
SETTINGS = ["--batch-size", "2", "--valid-fraction", "0.25", "--eval-steps", "50", "--samples", "0"]


@contextmanager
def started(words, folder):
    """Start a command in its own process group; yield it, and a function for its output."""
    log = folder / f"{words[0]}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*COMMAND, *words], cwd=folder, stdout=file, stderr=file, start_new_session=True,
            env=os.environ | {"DISPLAY": "", "WAYLAND_DISPLAY": "", "SSH_CONNECTION": "a 1 b 2"},
        )  # fmt: skip
    try:
        yield process, log.read_text
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(60)


def wait_for(function, seconds=120):
    end = time.monotonic() + seconds
    while not (value := function()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


def url_in(read_log):
    return wait_for(lambda: re.search(r"http://127\.0\.0\.1:\d+/\?token=\S+", read_log()))[0]


def get(url, path=None, **headers):
    """Status and text of the reply to a GET request to a page's server."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
    try:
        connection.request("GET", path or f"{parts.path}?{parts.query}", headers=headers)
        reply = connection.getresponse()
        return reply.status, reply.read().decode()
    finally:
        connection.close()


def test_a_report_is_served_until_ctrl_c_to_whom_has_the_address(workplace):
    with started(["report", "run", "new", "--live"], workplace) as (process, read_log):
        url = url_in(read_log)
        token = url.rpartition("=")[2]
        status, page = get(url)
        assert status == 200 and "Waiting for a run in new" in page
        status, text = get(url, "/update", **{"X-Token": token})
        news = json.loads(text)
        assert status == 200 and {line["run"] for line in news["lines"]} == {0}
        for path, headers in (
            ("/", {}),
            ("/update", {}),
            (f"/?token={token}x", {}),
            (f"/?token={token}", {"Host": "evil.example"}),
            ("/update", {"X-Token": token, "Origin": "http://evil.example"}),
        ):
            assert get(url, path, **headers)[0] == 403, (path, headers)
        assert get(url, f"/update?token={token}")[0] == 404  # only with the header
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        lines = read_log().splitlines()
        assert lines[1:] == ["Ctrl-C stops it", "Stopped"] and "open it in a browser" in lines[0]
    assert not (workplace / "new").exists() and not (workplace / "run/report.html").exists()


def test_flags_without_effect_are_refused(workplace):
    for words, message in (
        (["report", "run", "--no-open"], "`--no-open` has no effect without --live"),
        (["report", "run", "--port", "1"], "`--port` has no effect without --live"),
        (["report", "run", "--live", "--output", "x"], "`--output` has no effect with --live"),
        (["report", "base", "--live"], "base: a model, not a run folder"),
        (
            ["train", "pairs.jsonl", "--model", "base", "--output", "y", "--no-open"],
            "`--no-open` has no effect without --live",
        ),
    ):
        done = CliRunner().invoke(cli, words)
        assert done.exit_code == 1 and done.output.startswith(f"Error: {message}"), done.output
    assert not (workplace / "y").exists()


STATUS = "return document.querySelector('.status')?.textContent ?? ''"
LOSS = "figure[data-chart=Loss] .plot"


def interrupt_a_training_that_is_watched(window, folder):
    """Start a run, look at its curves while they grow, and stop the run with Ctrl-C."""
    with started([*TRAIN, *SETTINGS], folder) as (process, read_log):
        url = url_in(read_log)
        wait_for(lambda: "Training: step " in window.script(STATUS))
        window.hover(LOSS, 0.02)
        tooltip = "return document.querySelector('#tooltip:not([hidden])')?.innerText"
        assert window.wait_for(tooltip).startswith("step ")
        place = f"return Math.round(document.querySelector('{LOSS}').getBoundingClientRect().top)"
        top = window.script(place)
        first, lines = window.script(STATUS), window.script(f"{LINES}[0]")
        wait_for(lambda: window.script(STATUS) != first and window.script(f"{LINES}[0]") != lines)
        assert window.script(place) == top and window.script(tooltip)
        # The page of `train --live` has the same rows.
        news = json.loads(get(url, "/update", **{"X-Token": url.rpartition("=")[2]})[1])
        assert {line["chart"] for line in news["lines"]} >= {"Loss", "Margin"}
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, read_log()


LINES = f"return [...document.querySelectorAll('{LOSS} path.line')].map(e => e.getAttribute('d'))"


@pytest.mark.slow
@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with chromedriver on PATH")
def test_a_page_follows_a_run_in_chromium_without_a_reload(workplace):
    """The run is stopped in its middle and resumed; the page of `report --live` stays open."""
    shutil.rmtree(workplace / "run")
    with (
        started(["report", "run", "--live"], workplace) as (_, read_log),
        browser(workplace / "profile") as window,
    ):
        window.open(url_in(read_log))
        assert window.wait_for(STATUS) == "Waiting for a run in run"
        window.script("window.notReloaded = true")
        interrupt_a_training_that_is_watched(window, workplace)
        wait_for(lambda: "resume with: mlx-dpo train --resume" in window.script(STATUS))
        with started(["train", "--resume", "--output", "run"], workplace) as (process, train_log):
            assert process.wait(300) == 0, train_log()
        wait_for(lambda: window.script(STATUS).startswith("Finished: "))
        assert window.script("return window.notReloaded")
        assert window.script("return document.querySelectorAll('#evaluations tr').length") > 2
        assert window.messages() == []
        here = window.script("return location.host")
        urls = [url for url in window.requested_urls() if url.startswith("http")]
        assert {urlsplit(url).netloc for url in urls} == {here}
