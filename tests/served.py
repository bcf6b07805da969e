"""`mlx-dpo serve` in its own process, and raw HTTP requests to it."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path


@contextmanager
def served(*flags, **environment):
    """The base URL of a running server; Ctrl-C stops it at the end of the block.

    At the end the server must have printed no traceback and no failure of a request.
    """
    command = [sys.executable, "-c", "from mlx_dpo.cli import main; main()", "serve", *flags]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "stderr"
        with (
            log.open("w") as stderr,
            subprocess.Popen(
                [*command, "--port", "0"], stderr=stderr, env=dict(os.environ) | environment
            ) as server,
        ):
            while "Ctrl-C stops it" not in log.read_text():
                assert server.poll() is None, log.read_text()
                time.sleep(0.05)
            try:
                yield re.search(r"at (http://127\.0\.0\.1:\d+/v1)\n", log.read_text()).group(1)
            finally:
                server.send_signal(signal.SIGINT)
                server.wait(timeout=60)
        lines = log.read_text(errors="replace").splitlines()
    assert (server.returncode, lines[-1]) == (0, "Stopped")
    assert [line for line in lines if "Traceback" in line or "A request failed" in line] == []


def send(address, path, body=None, method="POST", **headers):
    """Status and body of the reply to a raw request; `path` begins after `/v1/`, or with `/`."""
    host, port = re.fullmatch(r"http://(.+):(\d+)/v1", address).groups()
    connection = HTTPConnection(host, int(port), timeout=60)
    data = json.dumps({"model": "base"} | body).encode() if isinstance(body, dict) else body
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request(method, path if path[0] == "/" else f"/v1/{path}", data, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def check_reply(case, status, text):
    """Assert that the reply is what a generated request expects, and never a server error."""
    if case.is_valid is None:
        assert status in (200, 400, 404), (case, status, text)
    else:
        assert (status == 200) == case.is_valid, (case, status, text)
    if status != 200:
        error = json.loads(text)["error"]
        assert 400 <= status < 500 and isinstance(error["message"], str), (case, status, text)
        assert case.field is None or error["param"] == case.field, (case, text)
