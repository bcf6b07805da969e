"""The web page on which a person ranks answers, over HTTP and in a browser if installed."""

import http.client
import json
import socket
import struct
import threading
from urllib.parse import urlsplit

import pytest

from mlx_dpo.collect.pairs_file import PairsFile
from mlx_dpo.collect.session import Answer, RankingSession, TaskSampler
from mlx_dpo.collect.web import (
    RankingServer,
    page_state,
    read_page,
    run_command,
    serve_session,
    state_version,
)
from mlx_dpo.data.prompts import make_prompt
from tests.webdriver import CHROMIUM, DRIVER, browser

HOSTILE = "<script>document.title = 'owned'</script> & <b>bold</b>"
PROMPTS = ["first?", HOSTILE, "third?"]


def sample(prompts, chunk):
    return [
        [Answer(f"{text} {prompt.messages[-1]['content']}", {}) for text in ("good", "bad")]
        for prompt in prompts
    ]


class Served:
    """A session served in its own thread."""

    def __init__(self, path, prompts=PROMPTS):
        tasks = TaskSampler(
            [make_prompt(text) for text in prompts], PairsFile(path), sample, chunk_size=2, seed=0
        )
        self.session, self.server = RankingSession(tasks), RankingServer(read_page())
        # A daemon, so that a failed test does not keep the program from ending.
        self.thread = threading.Thread(
            target=serve_session, args=(self.session, self.server), daemon=True
        )
        self.thread.start()

    def request(self, method, path, body=None, *, host=None, kind="application/json", **headers):
        """Return status, body and headers of the answer."""
        own_host = f"127.0.0.1:{self.server.server_port}"
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=30)
        connection.putrequest(method, path, skip_host=True)
        all_headers = {
            "Host": host or own_host,
            **{k.replace("_", "-"): v for k, v in headers.items()},
        }
        if body is not None:
            all_headers |= {"Content-Type": kind, "Content-Length": str(len(body))}
        for name, value in all_headers.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        try:
            return answer.status, answer.read().decode(), dict(answer.getheaders())
        finally:
            connection.close()

    def state(self):
        return json.loads(self.request("GET", "/state", X_Token=self.server.token)[1])

    def do(self, **command):
        body = json.dumps(command).encode()
        return json.loads(self.request("POST", "/do", body, X_Token=self.server.token)[1])


@pytest.fixture
def served(tmp_path):
    page = Served(tmp_path / "pairs.jsonl")
    yield page
    if page.thread.is_alive():
        page.do(version="", do="quit")
        page.thread.join(10)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_every_request_needs_the_token_and_a_loopback_host(served):
    token = served.server.token
    state = served.request("GET", "/state", X_Token=token)
    assert state[0] == 200
    rejected = [
        served.request("GET", "/"),
        served.request("GET", "/?token=" + "x" * len(token)),
        served.request("GET", f"/?token={token}", host="evil.example"),
        served.request("GET", f"/?token={token}", host=f"evil.example:{served.server.server_port}"),
        served.request("GET", "/state"),
        served.request("GET", "/nothing"),
        served.request("POST", "/do", b'{"do": "quit"}'),
        served.request("POST", f"/do?token={token}", b'{"do": "quit"}'),
        served.request("POST", "/do", b"{}", X_Token=token, Origin="http://evil.example"),
        served.request("POST", "/do", b"{}", X_Token=token, Origin="null"),
    ]
    assert [status for status, _, _ in rejected] == [403] * len(rejected)
    # A page of another origin cannot send JSON without a preflight request.
    assert served.request("POST", "/do", b"{}", kind="text/plain", X_Token=token)[0] == 415
    assert served.request("GET", f"/state?token={token}")[0] == 404
    assert served.thread.is_alive()


def test_the_server_listens_on_loopback_only(served):
    assert served.server.server_address[0] == "127.0.0.1"
    assert urlsplit(served.server.url).hostname == "127.0.0.1"


def test_the_page_loads_nothing_from_other_hosts(served):
    status, text, headers = served.request("GET", f"/?token={served.server.token}")
    assert status == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "unsafe-inline" not in headers["Content-Security-Policy"]
    assert "http://" not in text and "https://" not in text and "//" not in text.split("<script")[0]


def test_a_decision_is_on_disk_before_the_page_is_updated(served, tmp_path):
    state = served.state()
    best = state["answers"].index("good first?")
    after = served.do(version=state["version"], do="prefer", best=best, worst=1 - best)
    [row] = rows(tmp_path / "pairs.jsonl")
    assert row["chosen"][0]["content"] == "good first?"
    assert row["rejected"][0]["content"] == "bad first?"
    assert after["prompt"][0]["content"] == HOSTILE
    assert (after["decided"], after["left"]) == (1, 2)


def test_a_key_press_that_arrives_twice_counts_once(served, tmp_path):
    version = served.state()["version"]
    served.do(version=version, do="prefer", best=0, worst=1)
    again = served.do(version=version, do="prefer", best=1, worst=0)
    assert again["message"] == "This prompt already has a decision"
    assert len(rows(tmp_path / "pairs.jsonl")) == 1


def test_prompts_skipped_in_the_background_do_not_invalidate_a_key_press(tmp_path):
    """Prompts with identical answers are skipped while the person reads."""

    def sample_identical(prompts, chunk):
        return [[Answer("same", {})] * 2] if chunk else sample(prompts, chunk)

    prompts = [make_prompt(text) for text in PROMPTS]
    session = RankingSession(
        TaskSampler(
            prompts, PairsFile(tmp_path / "pairs.jsonl"), sample_identical, chunk_size=1, seed=0
        )
    )
    state = page_state(session)
    assert session.sample_chunk() and len(rows(tmp_path / "pairs.passed.jsonl")) == 1
    assert run_command(
        session, {"version": state["version"], "do": "prefer", "best": 0, "worst": 1}
    ) is (None)
    assert len(rows(tmp_path / "pairs.jsonl")) == 1
    # After an undo the version differs, although the same task is shown.
    assert run_command(session, {"version": state_version(session), "do": "undo"}) is None
    assert page_state(session)["prompt"] == state["prompt"]
    assert state_version(session) != state["version"]


def test_undo_shows_the_same_task_again_and_removes_the_row(served, tmp_path):
    first = served.state()
    after = served.do(version=first["version"], do="tie")
    assert len(rows(tmp_path / "pairs.passed.jsonl")) == 1
    back = served.do(version=after["version"], do="undo")
    assert (back["prompt"], back["answers"]) == (first["prompt"], first["answers"])
    assert rows(tmp_path / "pairs.passed.jsonl") == []


@pytest.mark.parametrize(
    "command",
    [
        {"do": "prefer", "best": 0, "worst": 0},
        {"do": "prefer", "best": 0, "worst": 2},
        {"do": "prefer", "best": -1, "worst": 0},
        {"do": "prefer"},
        {"do": "edit", "rejected": 0, "text": " "},
        {"do": "dance"},
        {},
    ],
)
def test_an_invalid_command_gives_a_message_and_changes_nothing(served, tmp_path, command):
    before = served.state()
    after = served.do(version=before["version"], **command)
    assert after.pop("message")
    assert after == {key: value for key, value in before.items() if key != "message"}
    assert rows(tmp_path / "pairs.jsonl") == []


def test_the_last_decision_can_be_undone_at_the_end(served, tmp_path):
    for _ in PROMPTS:
        state = served.do(version=served.state()["version"], do="skip")
    assert "No prompt is left" in state["message"]
    assert (state["answers"], state["over"]) == ([], False)
    state = served.do(version=state["version"], do="undo")
    assert state["prompt"][0]["content"] == "third?"


@pytest.mark.parametrize(
    "body",
    [
        b'{"do": ["tie"]}',
        b'{"do": {"tie": 1}, "version": "0:"}',
        b'{"do": "prefer", "best": true, "worst": 0}',
        b'{"do": "prefer", "best": [0]}',
        b'{"do": "prefer", "best": 1e400}',
        b'{"do": "edit", "text": 3}',
        b'{"do": "tie", "version": 0}',
        b'{"do": "tie", "undo": 1}',
        b'{"best": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"do": ' * 10_000,
        b"\xff",
        b"",
        b"[]",
        b"null",
    ],
)
def test_a_body_that_is_no_command_is_answered_400(served, capfd, body):
    status, text, _ = served.request("POST", "/do", body, X_Token=served.server.token)
    assert (status, text.count("\n")) == (400, 0)
    assert served.state()["decided"] == 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("length", "status"),
    [("9" * 5000, 413), ("2000000", 413), ("-1", 400), ("1e3", 400), (None, 411)],
)
def test_a_length_that_is_none_is_refused(served, capfd, length, status):
    with socket.create_connection(("127.0.0.1", served.server.server_port), timeout=30) as raw:
        lines = [
            "POST /do HTTP/1.1",
            f"Host: 127.0.0.1:{served.server.server_port}",
            f"X-Token: {served.server.token}",
            "Content-Type: application/json",
            *([] if length is None else [f"Content-Length: {length}"]),
        ]
        raw.sendall("\r\n".join([*lines, "", ""]).encode())
        assert raw.recv(1000).split(b" ")[1] == str(status).encode()
    assert served.state()["decided"] == 0
    assert capfd.readouterr() == ("", "")


def test_a_closed_connection_prints_nothing(served, capfd):
    """Before the request, in its head, in its body, and before the reply."""
    host = f"Host: 127.0.0.1:{served.server.server_port}\r\nX-Token: {served.server.token}\r\n"
    kind = "Content-Type: application/json\r\n"
    for sent in (
        "",
        "POST /do",
        "GET //[ HTTP/1.1\r\n" + host + "\r\n",
        "GET /state HTTP/1.1\r\n" + host + "\r\n",
        f"POST /do HTTP/1.1\r\n{host}{kind}Content-Length: 40\r\n\r\n{{",
        f'POST /do HTTP/1.1\r\n{host}{kind}Content-Length: 13\r\n\r\n{{"do": "tie"}}',
    ):
        raw = socket.create_connection(("127.0.0.1", served.server.server_port), timeout=30)
        raw.sendall(sent.encode())
        # A reset: what the server sends afterwards fails.
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raw.close()
        assert served.state()["decided"] == 0
    assert capfd.readouterr() == ("", "")


def test_a_request_that_is_queued_after_the_end_is_answered_at_once(tmp_path):
    server = RankingServer(read_page())
    with server.running():
        server.has_ended.set()
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
        connection.request("GET", "/state", headers={"X-Token": server.token})
        assert connection.getresponse().status == 503
        connection.close()


needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium and chromedriver on this machine"
)
TEXTS = "return [...document.querySelectorAll('#answers .text')].map(e => e.textContent.trim())"
SHOWN = "return document.querySelector('#prompt .turn')?.textContent"


@needs_browser
def test_decisions_by_keyboard_in_chromium_are_written_to_the_file(served, tmp_path):
    with browser(tmp_path / "profile") as page:
        page.open(served.server.url)
        page.wait_for(f"{SHOWN}?.includes('first?')")
        texts = page.script(TEXTS)
        page.press(str(1 + texts.index("good first?")))
        page.wait_for(f"{SHOWN}?.includes('script')")
        [row] = rows(tmp_path / "pairs.jsonl")
        assert row["chosen"][0]["content"] == "good first?"
        assert row["rejected"][0]["content"] == "bad first?"
        # Text of a model is never interpreted as HTML.
        assert page.script("return document.title") == "Which is better?"
        assert page.script("return document.querySelectorAll('main script, .text b').length") == 0
        page.press("t")
        page.wait_for(f"{SHOWN}?.includes('third?')")
        page.press("u")
        page.wait_for(f"{SHOWN}?.includes('script')")
        assert rows(tmp_path / "pairs.passed.jsonl") == []
        page.press("e", "2")
        page.wait_for("return document.activeElement.id === 'text'")
        page.press(*"tsq")  # typed as text, not as commands
        page.call("POST", "/actions", {"actions": [{"type": "key", "id": "k", "actions": [
            {"type": kind, "value": key}
            for kind, key in (("keyDown", "\ue009"), ("keyDown", "\ue007"),
                              ("keyUp", "\ue007"), ("keyUp", "\ue009"))
        ]}]})  # fmt: skip
        page.wait_for(f"{SHOWN}?.includes('third?')")
        assert "tsq" in rows(tmp_path / "pairs.jsonl")[1]["chosen"][0]["content"]
        assert rows(tmp_path / "pairs.jsonl")[1]["provenance"]["edited"] is True
        page.press("q")
        page.wait_for("return document.querySelector('#message').textContent.startsWith('Done')")
    served.thread.join(10)
    assert not served.thread.is_alive()


MARKDOWN = """\
# Title

[link](https://evil.example/a) [script](javascript:document.title='owned') ![image](/state?image)
<img src=/state onerror="document.title='owned'"> <script>document.title='owned'</script>
<a href="/state">raw</a> <https://evil.example/auto>

3. third

```html" onmouseover="document.title='owned'
<b>code</b>
```

| a | b |
|:--|---|
| 1 | 2 |
"""


@needs_browser
def test_markdown_is_rendered_and_hostile_markdown_is_inert_in_chromium(tmp_path):
    served = Served(tmp_path / "pairs.jsonl", [MARKDOWN, "second?"])
    with browser(tmp_path / "profile") as page:
        page.open(served.server.url)
        page.wait_for("return document.querySelector('#prompt h1') !== null")
        inside = "[...document.querySelectorAll('#prompt .text *')]"
        names = f"return [...new Set({inside}.map(e => e.localName))].sort()"
        assert page.script(names) == [
            "br", "code", "h1", "li", "ol", "p", "pre", "span", "table", "tbody", "td", "th",
            "thead", "tr",
        ]  # fmt: skip
        pairs = "[...e.attributes].map(a => `${a.name}=${a.value}`)"
        attributes = f"return {inside}.flatMap(e => {pairs})"
        assert set(page.script(attributes)) == {"class=link", "class=address", "start=3"}
        assert "(https://evil.example/a)" in page.script(SHOWN)
        assert page.script("return document.title") == "Which is better?"
        page.press("m")  # the plain text
        page.wait_for("return document.querySelector('#prompt h1') === null")
        assert "![image](/state?image)" in page.script(SHOWN)
        page.press("m")
        assert page.script("return document.querySelector('#undo').disabled") is True
        page.script("document.querySelector('.answer').click()")
        page.wait_for(f"{SHOWN}?.includes('second?')")
        assert page.script("return document.querySelector('#progress').value") == 1
        assert page.script("return document.querySelector('#undo').disabled") is False
        page.press("q")
        page.wait_for("return document.querySelector('#message').textContent.startsWith('Done')")
    served.thread.join(10)


@needs_browser
def test_another_page_in_the_same_browser_cannot_decide(served, tmp_path):
    """It may know the port, but not the token, and the browser does not let it send the header."""
    with browser(tmp_path / "profile") as page:
        page.open("data:text/html,other")
        page.script(
            "fetch(arguments[0], {method: 'POST', mode: 'no-cors', body: '{\"do\": \"quit\"}'})",
            f"http://127.0.0.1:{served.server.server_port}/do",
        )
        page.open(f"http://127.0.0.1:{served.server.server_port}/")
        assert "the token is missing" in page.script("return document.body.innerText")
    assert served.thread.is_alive()
    assert rows(tmp_path / "pairs.jsonl") == []
