"""A model at an address that answers prompts."""

import pytest

from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.prompts import make_prompt
from mlx_dpo.errors import ConfigError
from mlx_dpo.saved_runs.respond import open_any_responder
from tests.openai_api.fake_server import completion, fake_server

GREEDY = Sampling(max_tokens=7)


def ask(responder, *texts, sampling=GREEDY):
    conversations = [[{"role": "user", "content": text}] for text in texts]
    return responder.answer(conversations, sampling, name="question")


def test_answers_come_in_the_order_of_the_prompts():
    with fake_server() as server:
        responder = open_any_responder(server.url + "#m")
        texts = [f"{n}" for n in range(30)]
        assert ask(responder, *texts) == [f"You wrote: {n}" for n in range(30)]
    assert responder.provenance == {"model": server.url + "#m"}
    assert server.bodies[0].keys() == {"model", "messages", "max_tokens", "temperature"}
    assert (server.bodies[0]["max_tokens"], server.bodies[0]["temperature"]) == (7, 0)


def test_the_only_model_is_taken_and_several_are_listed():
    with fake_server(models=["alone"]) as server:
        assert open_any_responder(server.url).provenance == {"model": server.url + "#alone"}
    several = pytest.raises(ConfigError, match=r"name one of its models \(found a, b/c:8b\)")
    with fake_server(models=["a", "b/c:8b"]) as server, several:
        open_any_responder(server.url)


def test_thinking_is_no_part_of_an_answer():
    script = [
        completion("<think>[[A]]?</think>\n\nB"),
        completion("perhaps</think>C"),
        completion("D", reasoning_content="hm"),
        completion("<think>cut", "length"),
    ]
    with fake_server(script=script) as server:
        responder = open_any_responder(server.url + "#m")
        replies = [responder.reply([make_prompt(str(n))], GREEDY)[0] for n in range(4)]
    assert [reply.text for reply in replies] == ["B", "C", "D", ""]
    assert [reply.is_truncated for reply in replies] == [False, False, False, True]
