"""`mlx-dpo serve` in its own process, queried with OpenAI's client."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import mlx_lm
import openai
import pytest
from click.testing import CliRunner

from mlx_dpo.adapters.adapter_files import load_adapter
from mlx_dpo.chat.session import ChatSession
from mlx_dpo.cli import cli
from mlx_dpo.config.sampling import Sampling
from tests.checkpoints import make_adapter, make_checkpoint

TOKENS = 8
QUESTIONS = ("Where is the cat?", "Is it here?", "no")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("serve")))


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    return str(make_adapter(tmp_path_factory.mktemp("adapter"), model))


@contextmanager
def served(*flags):
    """The base URL of a running server; Ctrl-C stops it at the end of the block."""
    command = [sys.executable, "-c", "from mlx_dpo.cli import main; main()", "serve", *flags]
    with subprocess.Popen(
        [*command, "--port", "0"], stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as server:
        header = ""
        while "Ctrl-C stops it" not in header:
            line = server.stderr.readline()
            assert line, header
            header += line
        try:
            yield re.search(r"at (http://127\.0\.0\.1:\d+/v1)\n", header).group(1)
        finally:
            server.send_signal(signal.SIGINT)
            _, rest = server.communicate(timeout=60)
        assert (server.returncode, rest.splitlines()[-1]) == (0, "Stopped")
        assert "Traceback" not in rest


@pytest.fixture(scope="module")
def address(model, adapter):
    with served("--model", model, "--adapter", adapter) as address:
        yield address


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
        yield client


def ask(client, name, question, **settings):
    return client.chat.completions.create(
        model=name,
        messages=[{"role": "user", "content": question}],
        max_tokens=TOKENS,
        **{"temperature": 0} | settings,
    )


def answers_without_server(model, adapter=None):
    """The greedy answer to each question in a chat of its own, computed without a server."""
    policy, tokenizer = mlx_lm.load(model)
    if adapter:
        load_adapter(policy, Path(adapter))
    answers = {}
    for question in QUESTIONS:
        chat = ChatSession(policy, tokenizer, Sampling(max_tokens=TOKENS))
        reply = "".join(piece.text for piece in chat.reply(question))
        answers[question] = reply.removeprefix(" ")  # as mlx-lm's server does
    return answers


@pytest.fixture(scope="module")
def expected(model, adapter):
    return {
        "base": answers_without_server(model),
        "aligned": answers_without_server(model, adapter),
    }


def test_base_and_aligned_are_two_models_by_name(client):
    assert [model.id for model in client.models.list()] == ["aligned", "base"]


def test_each_model_answers_as_if_it_were_loaded_alone(client, expected):
    """Alternating, so that one model using the prompt cache of the other would be detected."""
    assert expected["base"] != expected["aligned"]
    for _ in range(2):
        for question in QUESTIONS:
            for name in ("base", "aligned"):
                answer = ask(client, name, question)
                assert answer.choices[0].message.content == expected[name][question]
                assert answer.model == name


def test_concurrent_requests_get_the_answers_of_their_model(address, expected):
    from concurrent.futures import ThreadPoolExecutor

    requests = [(name, question) for question in QUESTIONS for name in ("base", "aligned")] * 2

    def answer(name, question):
        with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
            return ask(client, name, question).choices[0].message.content

    with ThreadPoolExecutor(len(requests)) as pool:
        answers = list(pool.map(lambda request: answer(*request), requests))
    assert answers == [expected[name][question] for name, question in requests]


def test_a_streamed_answer_is_the_same(client, expected):
    chunks = list(ask(client, "aligned", QUESTIONS[0], stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == expected["aligned"][QUESTIONS[0]]
    assert len(chunks) > 3
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_seed_repeats_the_answer(client):
    settings = {"temperature": 1.0, "seed": 7}
    first, again = (ask(client, "base", "no", **settings) for _ in range(2))
    assert first.choices[0].message.content == again.choices[0].message.content


def test_plain_text_is_continued(client, model):
    answer = client.completions.create(
        model="base", prompt="The cat", max_tokens=TOKENS, temperature=0
    )
    chat = ChatSession(*mlx_lm.load(model), Sampling(max_tokens=TOKENS), raw=True)
    reply = "".join(piece.text for piece in chat.reply("The cat"))
    assert answer.choices[0].text == reply.removeprefix(" ")


def test_an_unknown_model_gets_404_with_the_known_names(client):
    with pytest.raises(openai.NotFoundError, match="`gpt` is not served here; request `aligned`, "):
        ask(client, "gpt", "hi")
    with pytest.raises(openai.NotFoundError, match="cannot choose `adapters` or `draft_model`"):
        ask(client, "base", "hi", extra_body={"adapters": "/etc"})


CRASHING = [  # each of these requests once ended the generating thread or the program
    ("completions", {"prompt": ["a b", "c"]}),
    ("completions", {"prompt": ""}),
    ("chat/completions", {"messages": [{"role": "user", "content": "hi"}], "stop": [3]}),
    ("chat/completions", {"messages": [{"role": "user", "content": "hi"}], "top_k": 10**6}),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": "hi"}], "logit_bias": {"999999": 5}},
    ),
    ("chat/completions", b"\xff\xfe"),
]


def posted(address, path, body, **headers):
    """Status and body of the answer to a raw request."""
    host, port = re.fullmatch(r"http://(.+):(\d+)/v1", address).groups()
    connection = HTTPConnection(host, int(port), timeout=30)
    data = body if isinstance(body, bytes) else json.dumps({"model": "base"} | body).encode()
    connection.request("POST", f"/v1/{path}", data, headers)
    answer = connection.getresponse()
    try:
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_no_request_ends_the_server(address, client, expected):
    for path, body in CRASHING:
        assert posted(address, path, body)[0] == 400, body
        answer = ask(client, "base", QUESTIONS[0]).choices[0].message.content
        assert answer == expected["base"][QUESTIONS[0]], body
    for length in ("-1", "99999999999"):
        status, body = posted(address, "completions", b"{}", **{"Content-Length": length})
        assert (status, "a request may have 67,108,864 bytes" in body) == (413, True)


def test_an_image_url_in_a_message_is_not_fetched(address):
    """mlx-lm would fetch images from any host before it checks whether the model reads images."""
    with socket.create_server(("127.0.0.1", 0)) as image_host:
        image_host.settimeout(0.2)
        url = f"http://127.0.0.1:{image_host.getsockname()[1]}/secret"
        content = [{"type": "image_url", "image_url": {"url": url}}]
        status, body = posted(
            address, "chat/completions", {"messages": [{"role": "user", "content": content}]}
        )
        assert (status, "only text is read" in body) == (400, True)
        with pytest.raises(TimeoutError):
            image_host.accept()


def test_a_stream_without_usage_option_is_complete(client):
    chunks = list(ask(client, "base", "no", stream=True, stream_options={}))
    assert chunks[-1].choices[0].finish_reason == "length"
    with_usage = list(
        ask(client, "base", "no", stream=True, stream_options={"include_usage": True})
    )
    assert with_usage[-1].usage.completion_tokens == TOKENS


@pytest.mark.parametrize(
    ("header", "value", "status"),
    [
        ("Origin", "https://example.org", 403),
        ("Origin", "null", 403),
        ("Host", "example.org", 403),
        ("Host", "[", 403),
        ("Host", "localhost:1", 200),
    ],
)
def test_web_pages_cannot_send_requests(address, header, value, status):
    """Neither with their own origin, nor through a host name that resolves to this machine."""
    connection = HTTPConnection(address.removeprefix("http://").removesuffix("/v1"))
    connection.request("GET", "/v1/models", headers={header: value})
    assert connection.getresponse().status == status
    connection.close()


def test_a_page_of_an_allowed_origin_may_send_requests(model):
    with served("--model", model, "--allowed-origins", "https://example.org") as address:
        connection = HTTPConnection(address.removeprefix("http://").removesuffix("/v1"))
        connection.request("GET", "/v1/models", headers={"Origin": "https://example.org"})
        answer = connection.getresponse()
        assert answer.getheader("Access-Control-Allow-Origin") == "https://example.org"
        assert [row["id"] for row in json.loads(answer.read())["data"]] == ["base"]
        connection.close()


def serve(*flags):
    return CliRunner().invoke(cli, ["serve", *flags])


def test_an_occupied_port_is_reported_before_a_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = serve("--model", "nowhere", "--port", str(port))
    assert result.exit_code == 1
    assert re.fullmatch(
        rf"Error: 127\.0\.0\.1:{port}: cannot listen here \(.+\); choose another --port or "
        r"--host\n",
        result.stderr,
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "name a run folder or a --model, and only one of them"),
        (("run", "--adapter", "a"), "`--adapter` has no effect with a run, which has its own"),
        (("--model", "m", "--temperature", "0", "--top-k", "4"), "`top_k` has no effect with"),
    ],
)
def test_contradicting_flags_give_a_one_line_error(flags, message):
    result = serve("--port", "0", *flags)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr
