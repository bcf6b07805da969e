"""A minimal WebDriver client for an installed Chromium."""

import json
import shutil
import subprocess
import time
import urllib.request
from contextlib import contextmanager

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
DRIVER = shutil.which("chromedriver")
ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
# Host names resolve only to this machine: the page must work without a network.
ARGUMENTS.append("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")


class Browser:
    def __init__(self, base):
        self.base = base

    def call(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, address):
        self.call("POST", "/url", {"url": address})

    def script(self, code, *arguments):
        return self.call("POST", "/execute/sync", {"script": code, "args": list(arguments)})

    def press(self, *keys):
        steps = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "k", "actions": steps}]})

    def hover(self, selector, share):
        """Move the mouse to this share of an element's width, at half of its height."""
        box = self.script(
            "const element = document.querySelector(arguments[0]); element.scrollIntoView();"
            "const { x, y, width, height } = element.getBoundingClientRect();"
            "return [x, y, width, height];",
            selector,
        )
        x, y = round(box[0] + share * box[2]), round(box[1] + box[3] / 2)
        moves = [{"type": "pointerMove", "duration": 0, "x": x + i, "y": y} for i in (0, 1)]
        mouse = {"type": "pointer", "id": "m", "actions": moves}
        self.call("POST", "/actions", {"actions": [mouse]})

    def messages(self):
        """Return the errors and warnings in the console since the last call."""
        return self.call("POST", "/se/log", {"type": "browser"})

    def requested_urls(self):
        """Return the addresses that the page has requested since the last call."""
        entries = self.call("POST", "/se/log", {"type": "performance"})
        events = [json.loads(entry["message"])["message"] for entry in entries]
        return [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]

    def wait_for(self, code, seconds=30):
        end = time.monotonic() + seconds
        while not (value := self.script(code)):
            assert time.monotonic() < end, self.script("return document.body.innerText")
            time.sleep(0.05)
        return value


@contextmanager
def browser(folder):
    driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        line = next(line for line in driver.stdout if "started successfully on port" in line)
        port = line.rstrip(".\n").rsplit(" ", 1)[1]
        address = f"http://127.0.0.1:{port}"
        arguments = [*ARGUMENTS, f"--user-data-dir={folder}"]
        options = {"binary": CHROMIUM, "args": arguments}
        logs = {"browser": "ALL", "performance": "ALL"}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": logs}
        capabilities = {"capabilities": {"alwaysMatch": wanted}}
        session = Browser(address).call("POST", "/session", capabilities)["sessionId"]
        page = Browser(f"{address}/session/{session}")
        try:
            yield page
        finally:
            page.call("DELETE", "")
    finally:
        driver.terminate()
        driver.wait()
        driver.stdout.close()
