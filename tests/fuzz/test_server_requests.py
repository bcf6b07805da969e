"""Generated requests against a running server: each costs at most itself."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from tests.checkpoints import VOCAB, make_checkpoint
from tests.fuzz.request_cases import request_cases
from tests.served import check_reply, send, served

pytestmark = pytest.mark.slow
SEED, COUNT = 21, 10_000
PROBE = {"messages": [{"role": "user", "content": "Where?"}], "max_tokens": 3, "temperature": 0}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    # A short context, so that a request for 2,147,483,647 tokens is soon answered.
    model = make_checkpoint(tmp_path_factory.mktemp("fuzz"), max_position_embeddings=200)
    # MLX would compile a kernel for every new temperature, which takes seconds on a CPU.
    with served("--model", str(model), "--max-tokens", "3", MLX_DISABLE_COMPILE="1") as address:
        yield address


def probe(address):
    status, text = send(address, "chat/completions", PROBE)
    assert status == 200, text
    return json.loads(text)["choices"][0]["message"]["content"]


def test_generated_requests_are_answered_or_refused_and_the_server_lives(address):
    expected = probe(address)
    for number, case in enumerate(request_cases(SEED, COUNT, VOCAB)):
        check_reply(case, *send(address, case.path, case.body))
        assert send(address, "/health", method="GET")[0] == 200, case
        if number % 50 == 0:
            assert probe(address) == expected, case


def leave_early(address, case):
    """Send a request and close the connection after the first bytes of the reply, or before."""
    url = urlsplit(address)
    with socket.create_connection((url.hostname, url.port), timeout=60) as connection:
        head = f"POST {case.path} HTTP/1.1\r\nHost: {url.netloc}\r\n"
        connection.sendall(f"{head}Content-Length: {len(case.body)}\r\n\r\n".encode())
        if len(case.body) % 2:
            connection.sendall(case.body[: len(case.body) // 2])
        else:
            connection.sendall(case.body)
            connection.recv(20)


def test_64_requests_at_once_of_which_some_leave_early(address):
    expected = probe(address)
    cases = list(request_cases(SEED + 1, 512, VOCAB))
    with ThreadPoolExecutor(64) as pool:
        early = [pool.submit(leave_early, address, case) for case in cases[::8]]
        replies = list(pool.map(lambda case: send(address, case.path, case.body), cases))
        for reply in early:
            reply.result()
    for case, reply in zip(cases, replies, strict=True):
        check_reply(case, *reply)
    assert probe(address) == expected
