"""`mlx-dpo serve` in its own process, queried with OpenAI's client."""

import json
import re
import socket
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
from tests.checkpoints import VOCAB, make_adapter, make_checkpoint
from tests.fuzz.request_cases import request_cases
from tests.served import check_reply, send, served

TOKENS = 8
QUESTIONS = ("Where is the cat?", "Is it here?", "no")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("serve")))


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    return str(make_adapter(tmp_path_factory.mktemp("adapter"), model))


@pytest.fixture(scope="module")
def address(model, adapter):
    # MLX would compile a kernel for every new temperature, which takes seconds on a CPU.
    flags = ("--model", model, "--adapter", adapter)
    with served(*flags, MLX_DISABLE_COMPILE="1") as address:
        yield address


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
        yield client


def ask(client, name, question, **settings):
    return client.chat.completions.create(
        model=name,
        messages=[{"role": "user", "content": question}],
        **{"temperature": 0, "max_tokens": TOKENS} | settings,
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


def test_without_a_file_feedback_is_refused_with_what_to_do(address):
    status, text = send(address, "feedback", b'{"id": "x", "rating": "good"}')
    assert status == 501
    assert "start the server with --feedback FILE" in json.loads(text)["error"]["message"]


def test_an_unknown_model_gets_404_with_the_known_names(client):
    with pytest.raises(openai.NotFoundError, match="`gpt` is not served here; request `aligned`, "):
        ask(client, "gpt", "hi")
    with pytest.raises(openai.NotFoundError, match="cannot choose `adapters` or `draft_model`"):
        ask(client, "base", "hi", extra_body={"adapters": "/etc"})


HELLO = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
CRASHING = [  # each of these requests once ended the generating thread or the program
    ("completions", {"prompt": ["a b", "c"]}),
    ("completions", {"prompt": ""}),
    ("chat/completions", HELLO | {"stop": [3]}),
    ("chat/completions", HELLO | {"top_k": 10**6}),
    ("chat/completions", HELLO | {"top_k": True}),
    ("chat/completions", HELLO | {"top_logprobs": True}),
    ("chat/completions", HELLO | {"frequency_penalty": 2**63}),
    ("chat/completions", HELLO | {"temperature": float("inf")}),
    (
        "chat/completions",
        HELLO | {"repetition_penalty": 1.1, "repetition_context_size": 2**63},
    ),
    ("chat/completions", HELLO | {"logit_bias": {"999999": 5}}),
    ("chat/completions", HELLO | {"messages": [{"role": "user", "content": "hi " * 600}]}),
    ("chat/completions", b"\xff\xfe"),
    ("chat/completions", b"[" * 10**5),
    ("chat/completions", b'{"seed": ' + b"9" * 5000 + b"}"),
    ("chat/completions", b"[]"),
    ("completions", b'{"prompt": "a", "max_tokens": 1, "max_tokens": 2}'),
    ("completions", b'{"prompt": "a", "metadata": {"a": "b", "a": "c"}}'),
    ("completions", '{"prompt": "a"}'.encode("utf-16")),
    ("chat/completions", b""),
]


def test_no_request_ends_the_server(address, client, expected):
    for path, body in CRASHING:
        status, text = send(address, path, body)
        assert (status, set(json.loads(text)["error"])) == (
            400,
            {"message", "type", "param", "code"},
        ), body
        answer = ask(client, "base", QUESTIONS[0]).choices[0].message.content
        assert answer == expected["base"][QUESTIONS[0]], body


@pytest.mark.parametrize(
    ("length", "status"),
    [("-1", 400), ("1e3", 400), ("1, 2", 400), ("\u0663", 400), ("99999999999", 413),
     ("9" * 5000, 413), ("0" * 5000, 400)],
)  # fmt: skip
def test_a_length_that_is_none_is_refused(address, length, status):
    answer, text = send(address, "completions", b"", Content_Length=length.encode())
    assert (answer, "message" in json.loads(text)["error"]) == (status, True)


def test_a_body_without_length_is_refused(address):
    def chunks():
        yield b'{"prompt": "a"}'

    assert send(address, "completions", chunks())[0] == 411  # sent as chunks


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/models/base", 200),
        ("GET", "/v1/models?limit=3", 200),
        ("GET", "/v1/models/gpt", 404),
        ("GET", "/v1/modelsmodels", 404),
        ("GET", "/", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
        ("PUT", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models/base", 405),
        ("BREW", "/v1/nothing", 404),
    ],
)
def test_a_path_has_its_methods_and_errors_are_objects(address, method, path, status):
    answer, text = send(address, path, b"{}", method)
    assert answer == status
    assert set(json.loads(text)) in ({"error"}, {"object", "data"}, {
        "id", "object", "created", "owned_by", "digest"})  # fmt: skip


def test_models_of_the_same_name_are_told_apart_by_their_digest(address):
    """Clients that store answers can then tell whether a model has changed under its name."""
    rows = json.loads(send(address, "models", method="GET")[1])["data"]
    digests = {row["id"]: row["digest"] for row in rows}
    assert digests.keys() == {"aligned", "base"} and len(set(digests.values())) == 2
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests.values())


def test_openai_clients_can_read_the_error(client):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "base", "hi", extra_body={"top_k": -1})
    assert (caught.value.param, caught.value.type) == ("top_k", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "base", "hi " * 600)
    assert caught.value.code == "context_length_exceeded"


def test_a_length_beyond_the_context_is_clipped(client):
    answer = ask(client, "base", "hi", max_tokens=10**9)
    assert answer.usage.total_tokens <= 512


def test_generated_requests_are_answered_or_refused(address):
    """The slow suite in `tests/fuzz` sends many more."""
    for case in request_cases(3, 100, VOCAB):
        check_reply(case, *send(address, case.path, case.body))


def test_an_image_url_in_a_message_is_not_fetched(address):
    """mlx-lm would fetch images from any host before it checks whether the model reads images."""
    with socket.create_server(("127.0.0.1", 0)) as image_host:
        image_host.settimeout(0.2)
        url = f"http://127.0.0.1:{image_host.getsockname()[1]}/secret"
        content = [{"type": "image_url", "image_url": {"url": url}}]
        status, body = send(
            address, "chat/completions", {"messages": [{"role": "user", "content": content}]}
        )
        assert (status, "only text is supported" in body) == (400, True)
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
        ((), "missing RUN (a run folder) or --model"),
        (
            ("run", "--adapter", "a"),
            "`--adapter` has no effect with a run, which has its own adapter",
        ),
        (("--model", "m", "--temperature", "0", "--top-k", "4"), "`top_k` has no effect with"),
    ],
)
def test_contradicting_flags_give_a_one_line_error(flags, message):
    result = serve("--port", "0", *flags)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr
