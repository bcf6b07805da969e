"""The page on which a person picks, over HTTP and in a browser where there is one."""

import http.client
import json
import threading
from urllib.parse import urlsplit

import pytest

from mlx_dpo.collect.pairs_file import PairsFile
from mlx_dpo.collect.session import Answer, RankingSession, TaskSampler
from mlx_dpo.collect.web import (
    LoopbackServer,
    page_state,
    read_page,
    run_command,
    serve_session,
    state_token,
)
from mlx_dpo.data.prompts import make_prompt
from tests.webdriver import CHROMIUM, DRIVER, browser

HOSTILE = "<script>document.title = 'owned'</script> & <b>bold</b>"
QUESTIONS = ["first?", HOSTILE, "third?"]


def sample(prompts, chunk):
    return [
        [Answer(f"{text} {prompt.messages[-1]['content']}", {}) for text in ("good", "bad")]
        for prompt in prompts
    ]


class Served:
    """A session served in a thread of its own."""

    def __init__(self, path, prompts=QUESTIONS):
        asked = TaskSampler(
            [make_prompt(text) for text in prompts], PairsFile(path), sample, chunk=2, seed=0
        )
        self.session, self.server = RankingSession(asked), LoopbackServer(read_page())
        self.thread = threading.Thread(target=serve_session, args=(self.session, self.server))
        self.thread.start()

    def ask(self, method, path, body=None, *, host=None, kind="application/json", **headers):
        """Status and body."""
        own = f"127.0.0.1:{self.server.server_port}"
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=30)
        connection.putrequest(method, path, skip_host=True)
        sent = {"Host": host or own, **{k.replace("_", "-"): v for k, v in headers.items()}}
        if body is not None:
            sent |= {"Content-Type": kind, "Content-Length": str(len(body))}
        for name, value in sent.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        try:
            return answer.status, answer.read().decode(), dict(answer.getheaders())
        finally:
            connection.close()

    def state(self):
        return json.loads(self.ask("GET", "/state", X_Token=self.server.token)[1])

    def do(self, **command):
        body = json.dumps(command).encode()
        return json.loads(self.ask("POST", "/do", body, X_Token=self.server.token)[1])


@pytest.fixture
def served(tmp_path):
    made = Served(tmp_path / "pairs.jsonl")
    yield made
    if made.thread.is_alive():
        made.do(question="", do="quit")
        made.thread.join(10)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_every_request_needs_the_token_and_this_machines_name(served):
    token = served.server.token
    state = served.ask("GET", "/state", X_Token=token)
    assert state[0] == 200
    refused = [
        served.ask("GET", "/"),
        served.ask("GET", "/?token=" + "x" * len(token)),
        served.ask("GET", f"/?token={token}", host="evil.example"),
        served.ask("GET", f"/?token={token}", host=f"evil.example:{served.server.server_port}"),
        served.ask("GET", "/state"),
        served.ask("GET", "/nothing"),
        served.ask("POST", "/do", b'{"do": "quit"}'),
        served.ask("POST", f"/do?token={token}", b'{"do": "quit"}'),
        served.ask("POST", "/do", b"{}", X_Token=token, Origin="http://evil.example"),
        served.ask("POST", "/do", b"{}", X_Token=token, Origin="null"),
    ]
    assert [status for status, _, _ in refused] == [403] * len(refused)
    # What a page from elsewhere can send without asking first is no JSON.
    assert served.ask("POST", "/do", b"{}", kind="text/plain", X_Token=token)[0] == 415
    assert served.ask("GET", f"/state?token={token}")[0] == 404
    assert served.thread.is_alive()


def test_the_server_listens_on_loopback_alone(served):
    assert served.server.server_address[0] == "127.0.0.1"
    assert urlsplit(served.server.address).hostname == "127.0.0.1"


def test_the_page_may_load_nothing_from_anywhere(served):
    status, text, headers = served.ask("GET", f"/?token={served.server.token}")
    assert status == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "unsafe-inline" not in headers["Content-Security-Policy"]
    assert "http://" not in text and "https://" not in text and "//" not in text.split("<script")[0]


def test_a_pick_is_on_disk_before_the_page_hears_of_it(served, tmp_path):
    state = served.state()
    best = state["answers"].index("good first?")
    after = served.do(question=state["question"], do="prefer", best=best, worst=1 - best)
    [row] = rows(tmp_path / "pairs.jsonl")
    assert row["chosen"][0]["content"] == "good first?"
    assert row["rejected"][0]["content"] == "bad first?"
    assert after["prompt"][0]["content"] == HOSTILE
    assert (after["decided"], after["left"]) == (1, 2)


def test_a_key_that_arrives_twice_counts_once(served, tmp_path):
    question = served.state()["question"]
    served.do(question=question, do="prefer", best=0, worst=1)
    again = served.do(question=question, do="prefer", best=1, worst=0)
    assert again["said"] == "That was decided already"
    assert len(rows(tmp_path / "pairs.jsonl")) == 1


def test_what_is_passed_over_meanwhile_makes_no_key_come_too_late(tmp_path):
    """Prompts whose answers are alike are decided by nobody while the person reads."""

    def alike(prompts, chunk):
        return [[Answer("same", {})] * 2] if chunk else sample(prompts, chunk)

    prompts = [make_prompt(text) for text in QUESTIONS]
    session = RankingSession(
        TaskSampler(prompts, PairsFile(tmp_path / "pairs.jsonl"), alike, chunk=1, seed=0)
    )
    state = page_state(session)
    assert session.prepare() and len(rows(tmp_path / "pairs.passed.jsonl")) == 1
    assert run_command(
        session, {"question": state["question"], "do": "prefer", "best": 0, "worst": 1}
    ) is (None)
    assert len(rows(tmp_path / "pairs.jsonl")) == 1
    # After a step back the state is another one, though the same question stands there.
    assert run_command(session, {"question": state_token(session), "do": "undo"}) is None
    assert page_state(session)["prompt"] == state["prompt"]
    assert state_token(session) != state["question"]


def test_undo_asks_the_same_again_and_takes_the_row_off(served, tmp_path):
    first = served.state()
    after = served.do(question=first["question"], do="tie")
    assert len(rows(tmp_path / "pairs.passed.jsonl")) == 1
    back = served.do(question=after["question"], do="undo")
    assert (back["prompt"], back["answers"]) == (first["prompt"], first["answers"])
    assert rows(tmp_path / "pairs.passed.jsonl") == []


@pytest.mark.parametrize(
    "command",
    [
        {"do": "prefer", "best": 0, "worst": 0},
        {"do": "prefer", "best": 0, "worst": 2},
        {"do": "prefer", "best": -1, "worst": 0},
        {"do": "prefer"},
        {"do": "improve", "worse": 0, "text": " "},
        {"do": "dance"},
        {},
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(served, tmp_path, command):
    before = served.state()
    after = served.do(question=before["question"], **command)
    assert after.pop("said")
    assert after == {key: value for key, value in before.items() if key != "said"}
    assert rows(tmp_path / "pairs.jsonl") == []


def test_at_the_end_the_last_pick_can_still_be_taken_back(served, tmp_path):
    for _ in QUESTIONS:
        state = served.do(question=served.state()["question"], do="skip")
    assert "No prompt is left" in state["said"]
    assert (state["answers"], state["over"]) == ([], False)
    state = served.do(question=state["question"], do="undo")
    assert state["prompt"][0]["content"] == "third?"


needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium and chromedriver on this machine"
)
TEXTS = "return [...document.querySelectorAll('.text')].map(e => e.textContent)"
SHOWN = "return document.querySelector('#prompt .turn')?.textContent"


@needs_browser
def test_picks_by_keyboard_in_chromium_land_in_the_file(served, tmp_path):
    with browser(tmp_path / "profile") as seen:
        seen.open(served.server.address)
        seen.wait_for(f"{SHOWN}?.includes('first?')")
        texts = seen.script(TEXTS)
        seen.press(str(1 + texts.index("good first?")))
        seen.wait_for(f"{SHOWN}?.includes('script')")
        [row] = rows(tmp_path / "pairs.jsonl")
        assert row["chosen"][0]["content"] == "good first?"
        assert row["rejected"][0]["content"] == "bad first?"
        # Text of models is text.
        assert seen.script("return document.title") == "Which is better?"
        assert seen.script("return document.querySelectorAll('main b b, .text *').length") == 0
        seen.press("t")
        seen.wait_for(f"{SHOWN}?.includes('third?')")
        seen.press("u")
        seen.wait_for(f"{SHOWN}?.includes('script')")
        assert rows(tmp_path / "pairs.passed.jsonl") == []
        seen.press("e", "2")
        seen.wait_for("return document.activeElement.id === 'text'")
        seen.press(*"tsq")  # text, and no keys
        seen.call("POST", "/actions", {"actions": [{"type": "key", "id": "k", "actions": [
            {"type": kind, "value": key}
            for kind, key in (("keyDown", "\ue009"), ("keyDown", "\ue007"),
                              ("keyUp", "\ue007"), ("keyUp", "\ue009"))
        ]}]})  # fmt: skip
        seen.wait_for(f"{SHOWN}?.includes('third?')")
        assert "tsq" in rows(tmp_path / "pairs.jsonl")[1]["chosen"][0]["content"]
        assert rows(tmp_path / "pairs.jsonl")[1]["provenance"]["edited"] is True
        seen.press("q")
        seen.wait_for("return document.querySelector('#said').textContent.startsWith('Done')")
    served.thread.join(10)
    assert not served.thread.is_alive()


@needs_browser
def test_another_page_in_the_same_browser_cannot_pick(served, tmp_path):
    """It knows the port, not the token; and the browser does not let it send the header."""
    with browser(tmp_path / "profile") as seen:
        seen.open("data:text/html,elsewhere")
        seen.script(
            "fetch(arguments[0], {method: 'POST', mode: 'no-cors', body: '{\"do\": \"quit\"}'})",
            f"http://127.0.0.1:{served.server.server_port}/do",
        )
        seen.open(f"http://127.0.0.1:{served.server.server_port}/")
        assert "the token is missing" in seen.script("return document.body.innerText")
    assert served.thread.is_alive()
    assert rows(tmp_path / "pairs.jsonl") == []
