"""The HTTP client: what is retried, what is an error, and that nothing is sent elsewhere."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from email.utils import formatdate

import pytest

from mlx_dpo.errors import ModelError
from mlx_dpo.openai_client import client as client_module
from mlx_dpo.openai_client.client import ApiClient
from mlx_dpo.openai_client.connection import Connection
from mlx_dpo.openai_client.reply import MAX_REPLY_BYTES, TransientError, parse_reply, retry_after
from tests.openai_client.fake_server import completion, echo, fake_server

OK = completion("fine")
BUSY = (429, {}, {"error": {"message": "slow down"}})


def body(text="hi", **more):
    return {"model": "m", "messages": [{"role": "user", "content": text}]} | more


def complete(server, bodies=None, **settings):
    """Return the texts of the replies by the number of the request, and the counts."""
    connection = Connection(**{"max_concurrency": 1} | settings)
    texts = {}
    client = ApiClient(connection.open(server.url), connection)
    try:
        client.complete(bodies or [body()], lambda n, reply: texts.update({n: reply.text}))
    except ModelError as error:
        return texts, connection.counts, str(error).removeprefix(f"{server.url}: ")
    return texts, connection.counts, None


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 529])
def test_a_status_that_may_pass_is_retried(status):
    with fake_server(OK, script=[(status, {}, b"")] * 4) as server:
        texts, counts, error = complete(server)
    assert (texts, error) == ({0: "fine"}, None)
    assert (counts.requests, counts.retries) == (5, 4)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "refused the request (status 400, slow down); fix what it names"),
        (401, "(status 401, slow down); give the name of a variable with the API key"),
        (404, "(status 404, slow down); check the address, which mostly ends in /v1"),
        (418, "(status 418, slow down)"),
    ],
)
def test_a_status_that_stays_is_one_error_at_once(status, message):
    with fake_server((status, {}, {"error": {"message": "slow\n down"}})) as server:
        texts, counts, error = complete(server)
    assert texts == {} and message in error and "\n" not in error
    assert (counts.requests, counts.retries) == (1, 0)


def test_a_used_up_quota_is_not_retried():
    quota = {"error": {"message": "pay", "code": "insufficient_quota"}}
    with fake_server((429, {}, quota)) as server:
        _, counts, error = complete(server)
    assert "status 429, pay" in error and "quota" in error
    assert counts.requests == 1


def test_a_busy_server_is_given_up_after_all_attempts():
    with fake_server(BUSY) as server:
        texts, counts, error = complete(server)
    assert error == "the server is busy or failed (status 429, slow down) (5 attempts)"
    assert (texts, counts.requests, counts.retries) == ({}, 5, 4)


def test_retry_after_is_kept_by_all_requests():
    """While the server asks to wait, a second worker sends nothing either."""
    times, is_busy = [], threading.Event()

    def busy(request):
        is_busy.set()
        return (429, {"Retry-After": "0.5"}, b"")

    def slow(request):
        assert is_busy.wait(20)
        time.sleep(0.2)
        times.append(time.monotonic())
        return OK

    def answer(request):
        times.append(time.monotonic())
        return OK

    with fake_server(answer, script=[busy, slow]) as server:
        bodies = [body(str(n)) for n in range(6)]
        texts, counts, _ = complete(server, bodies, max_concurrency=2)
    assert (len(texts), counts.requests, counts.retries) == (6, 7, 1)
    assert times[1] - times[0] > 0.2  # half a second since the server was busy


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("2", 2), ("0.5", 0.5), ("-3", 0), ("soon", None), ("nan", None), (None, None), ("", None)],
)
def test_retry_after_is_a_number_of_seconds(value, seconds):
    assert retry_after(value) == seconds


def test_retry_after_may_be_a_date():
    assert 55 < retry_after(formatdate(time.time() + 60, usegmt=True)) <= 60
    assert retry_after(formatdate(time.time() - 60, usegmt=True)) == 0


def test_a_wait_of_an_hour_is_an_error_that_says_so():
    with fake_server((503, {"Retry-After": "3600"}, b"")) as server:
        _, counts, error = complete(server)
    assert "asks to wait 3,600 seconds; try again then" in error
    assert counts.requests == 1


def test_a_request_that_takes_too_long_is_repeated():
    release = threading.Event()

    def hang(request):
        release.wait(20)

    with fake_server(OK, script=[hang]) as server:
        texts, counts, error = complete(server, request_timeout=0.3)
        release.set()
    assert (texts, error, counts.retries) == ({0: "fine"}, None, 1)


def test_the_time_limit_covers_a_reply_that_drips():
    """A read timeout alone would begin anew with each byte."""
    stop = threading.Event()

    def drip(request):
        return (b" " for _ in iter(lambda: stop.wait(0.02), True))

    with fake_server(drip) as server:
        texts, counts, error = complete(server, request_timeout=0.3)
        stop.set()
    assert texts == {} and counts.requests == 5
    assert error == "no answer within 0.3 seconds (--request-timeout) (5 attempts)"


def test_a_connection_that_ends_without_a_reply_is_retried():
    with fake_server(OK, script=[None]) as server:
        texts, counts, _ = complete(server)
    assert (texts, counts.retries) == ({0: "fine"}, 1)


def test_a_dead_server_is_one_error():
    with fake_server() as server:
        pass
    texts, _, error = complete(server)
    assert texts == {} and error.startswith("no answer (") and error.endswith("(5 attempts)")


UNUSABLE = {
    "HTML": b"<html>\x1b[2J<body>Log in</body></html>",
    "empty": b"",
    "half": b'{"choices": [{"mess',
    "a list": b"[]",
    "no choices": {},
    "empty choices": {"choices": []},
    "choices of another type": {"choices": {"0": OK["choices"][0]}},
    "a choice of another type": {"choices": ["fine"]},
    "no message": {"choices": [{"text": "fine"}]},
    "a number": completion(5),
    "nothing": completion(None),
    "parts that are no text": completion([{"type": "text", "text": "a"}, {"type": "image_url"}]),
    "half a character": b'{"choices": [{"message": {"content": "\\ud800"}}]}',
    "a deep nest": b"[" * 100_000,
    "a huge number": b'{"choices": ' + b"9" * 5_000 + b"}",
    "Latin-1": '{"choices": [{"message": {"content": "é"}}]}'.encode("latin-1"),
}


@pytest.mark.parametrize("garbage", UNUSABLE.values(), ids=UNUSABLE)
def test_a_reply_that_is_no_answer_is_repeated_then_counted(garbage):
    with fake_server(OK, script=[OK] + [garbage] * 5) as server:
        texts, counts, error = complete(server, [body(str(n)) for n in range(3)])
    assert (texts, error) == ({0: "fine", 1: "", 2: "fine"}, None)
    assert (counts.requests, counts.retries, counts.unusable) == (7, 4, 1)


def test_garbage_that_passes_is_not_counted():
    with fake_server(OK, script=[b"<html>"] * 4) as server:
        texts, counts, _ = complete(server)
    assert (texts, counts.retries, counts.unusable) == ({0: "fine"}, 4, 0)


def test_a_server_that_sends_only_garbage_is_given_up_after_three_replies():
    with fake_server(b"<html>\x1b[2J Log in", script=[OK]) as server:
        texts, counts, error = complete(server, [body(str(n)) for n in range(9)])
    assert texts == {0: "fine", 1: "", 2: ""}
    assert counts.requests == 1 + 3 * 5
    assert "not a chat completion: not JSON" in error and "it begins '<html>" in error
    assert "\x1b" not in error


def test_a_server_that_sends_garbage_now_and_then_is_not_given_up():
    """Only unusable replies in a row end the command."""
    script = ([OK] + [b"<html>"] * 5) * 4
    with fake_server(OK, script=script) as server:
        texts, counts, error = complete(server, [body(str(n)) for n in range(8)])
    assert (texts, error) == ({n: "" if n % 2 else "fine" for n in range(8)}, None)
    assert (counts.requests, counts.retries, counts.unusable) == (4 * 6, 4 * 4, 4)


def test_a_reply_beyond_all_bounds_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(client_module, "MAX_REPLY_BYTES", 100_000)
    with fake_server(OK, script=[OK] + [completion("x" * 200_000)] * 5) as server:
        texts, counts, _ = complete(server, [body("a"), body("b")])
    assert (texts, counts.unusable) == ({0: "fine", 1: ""}, 1)
    assert MAX_REPLY_BYTES == 8_000_000


@pytest.mark.parametrize(
    ("reply", "text", "reason"),
    [
        (completion("a", "length"), "a", "length"),
        (completion("a", None), "a", "stop"),
        (completion("a", "eos"), "a", "stop"),
        (completion([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), "ab", "stop"),
        (completion(None, refusal="No."), "No.", "stop"),
        (completion(None, "length", reasoning_content="Hm"), "", "length"),
        (completion(None, reasoning="Hm"), "", "stop"),
        (completion(None, "content_filter"), "", "stop"),
    ],
)
def test_answers_of_other_forms_are_read(reply, text, reason):
    with fake_server(reply) as server:
        texts, counts, error = complete(server)
    assert (texts, error, counts.retries) == ({0: text}, None, 0)
    parsed = parse_reply(json.dumps(reply).encode())
    assert (parsed.text, parsed.finish_reason) == (text, reason)


def test_a_redirect_is_not_followed_and_the_key_goes_nowhere_else(monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    with fake_server() as other:
        target = {"Location": f"{other.url}/chat/completions"}
        for status in (301, 302, 303, 307, 308):
            with fake_server((status, target, b"")) as server:
                _, counts, error = complete(server, api_key_env="MY_KEY")
            assert f"redirects to {other.url}/chat/completions" in error
            assert counts.requests == 1
            [headers] = server.headers_seen
            assert headers["Authorization"] == "Bearer sk-secret"
    assert other.paths == []


def test_a_key_that_the_server_quotes_is_hidden(monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    wrong = (401, {}, {"error": {"message": "wrong key sk-secret"}})
    with fake_server(wrong) as server:
        _, _, error = complete(server, api_key_env="MY_KEY")
    assert "wrong key ***" in error and "sk-secret" not in error


def test_without_a_key_no_authorization_is_sent(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with fake_server(OK) as server:
        complete(server)
    assert "Authorization" not in server.headers_seen[0]


def test_a_proxy_of_the_environment_gets_nothing_that_is_meant_for_this_machine(monkeypatch):
    with fake_server(OK) as proxy, fake_server(OK) as server:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        texts, _, _ = complete(server)
    assert (texts, proxy.paths) == ({0: "fine"}, [])


@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_requests_are_sent_at_once_than_allowed(limit):
    arrived = threading.Barrier(limit)

    def answer(request):
        arrived.wait(20)  # passes only if `limit` requests are there at once
        return echo(request)

    with fake_server(answer) as server:
        texts, _, _ = complete(server, [body(str(n)) for n in range(12)], max_concurrency=limit)
    assert server.most_at_once == limit
    assert texts == {n: f"You wrote: {n}" for n in range(12)}


def test_a_field_that_a_server_does_not_take_is_replaced_or_left_out():
    """OpenAI's newer models take `max_completion_tokens`, and no temperature."""

    def answer(request):
        for name, code in (("max_tokens", "parameter"), ("temperature", "value")):
            if name in request:
                error = {"message": "no", "param": name, "code": f"unsupported_{code}"}
                return (400, {}, {"error": error})
        return OK

    with fake_server(answer) as server:
        bodies = [body(str(n), max_tokens=9, temperature=0.0, seed=1) for n in range(2)]
        texts, counts, _ = complete(server, bodies)
    assert (texts, counts.retries) == ({0: "fine", 1: "fine"}, 0)
    assert len(server.bodies) == 4
    assert server.bodies[-1] == body("1", max_completion_tokens=9, seed=1)


def test_a_field_that_a_request_needs_is_not_left_out():
    error = {"message": "no", "param": "messages", "code": "unsupported_value"}
    with fake_server((400, {}, {"error": error})) as server:
        _, counts, message = complete(server)
    assert "status 400, no" in message and counts.requests == 1


def test_the_bytes_of_all_requests_are_counted():
    with fake_server(OK, script=[BUSY]) as server:
        _, counts, _ = complete(server, [body("é" * 10)])
    # As JSON, each é is \u00e9: 6 bytes.
    size = len('{"model": "m", "messages": [{"role": "user", "content": ""}]}') + 60
    assert (counts.requests, counts.sent_bytes) == (2, 2 * size)


CTRL_C = """
import sys
from mlx_dpo.openai_client.client import ApiClient
from mlx_dpo.openai_client.connection import Connection
connection = Connection()
client = ApiClient(connection.open(sys.argv[1]), connection)
bodies = [{"messages": [{"content": str(n)}]} for n in range(9)]
try:
    client.complete(bodies, lambda number, reply: print(number, flush=True))
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_ctrl_c_ends_requests_at_once_and_loses_no_reply():
    release, hanging = threading.Event(), threading.Event()

    def hang(request):
        hanging.set()
        release.wait(60)

    with fake_server(hang, script=[OK]) as server:
        command = [sys.executable, "-c", CTRL_C, server.url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert hanging.wait(60)
            assert process.stdout.readline() == "0\n"
            os.kill(process.pid, signal.SIGINT)
            assert process.stdout.read() == "interrupted\n"
            assert process.wait(30) == 0
        assert not release.is_set()
        release.set()


def test_requests_work_inside_a_running_event_loop():
    """A notebook has one on its thread."""

    async def cell(server):
        return complete(server)

    with fake_server(OK) as server:
        texts, _, error = asyncio.run(cell(server))
    assert (texts, error) == ({0: "fine"}, None)


def test_a_cancelled_request_that_ends_as_an_error_is_not_repeated(monkeypatch):
    """A connection may report a cancelled read as an error of its own."""
    attempts = []

    async def attempt(self, client, content):
        attempts.append(content)
        assert len(attempts) == 1, "the request was repeated"
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise TransientError("the connection was closed") from None

    async def cancel_one():
        connection = Connection()
        client = ApiClient(connection.open("http://127.0.0.1:1/v1#m"), connection)
        task = asyncio.create_task(client._complete(None, body()))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    monkeypatch.setattr(ApiClient, "_attempt", attempt)
    asyncio.run(cancel_one())
