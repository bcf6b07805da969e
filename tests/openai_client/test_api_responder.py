"""A model at an address that answers prompts."""

import json

import pytest

from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.prompts import make_prompt
from mlx_dpo.errors import ConfigError, DPOError, ModelError
from mlx_dpo.evaluation.judge import open_judge
from mlx_dpo.openai_client.address import Address
from mlx_dpo.openai_client.connection import Connection
from mlx_dpo.openai_client.responder import open_api_responder
from mlx_dpo.saved_runs.respond import open_any_responder
from tests.openai_client.fake_server import completion, fake_server

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


def prompts(*texts):
    return [make_prompt(text) for text in texts]


def test_equal_prompts_get_answers_of_different_seeds():
    sampling = Sampling(temperature=1.0, seed=2**32 - 1, max_tokens=5)
    with fake_server(lambda body: completion(str(body["seed"]))) as server:
        responder = open_any_responder(server.url + "#m")
        replies = responder.reply(prompts("a", "b", "a", "a"), sampling)
    # The largest seed is 2^32 - 1.
    assert [reply.text for reply in replies] == ["4294967295", "4294967295", "0", "1"]


def test_answers_without_a_seed_are_new_ones_each_time():
    with fake_server(lambda body: completion(str(body["seed"]))) as server:
        responder = open_any_responder(server.url + "#m")
        replies = [responder.reply(prompts("a", "a"), Sampling(temperature=1.0)) for _ in range(2)]
    assert len({reply.text for pair in replies for reply in pair}) == 4
    assert len(server.bodies) == 4


def test_equal_greedy_requests_are_sent_once():
    with fake_server() as server:
        connection = Connection()
        responder = open_any_responder(server.url + "#m", connection)
        assert ask(responder, "a", "b", "a") == ["You wrote: a", "You wrote: b", "You wrote: a"]
    assert len(server.bodies) == 2 and "seed" not in server.bodies[0]
    assert (connection.counts.requests, connection.counts.replies) == (2, 2)


def test_what_was_answered_is_not_sent_again():
    with fake_server() as server:
        for expected in ((2, 2, 0), (1, 1, 2)):
            connection = Connection()
            responder = open_any_responder(server.url + "#m", connection)
            texts = ["a", "b"] if expected[0] == 2 else ["a", "c", "b"]
            assert ask(responder, *texts) == [f"You wrote: {text}" for text in texts]
            counts = connection.counts
            assert (counts.requests, counts.replies, counts.cached) == expected
        assert len(server.bodies) == 3
        ask(responder, "a", sampling=Sampling(max_tokens=8))  # another request
        assert len(server.bodies) == 4
        server.models["data"][0]["digest"] = "other weights under the same name"
        ask(open_any_responder(server.url + "#m"), "a")
        assert len(server.bodies) == 5
        judge = open_judge(None, server.url, None)
        assert judge.provenance()["judge_digest"] == "other weights under the same name"
        server.models["data"][0]["created"] = 5  # some servers give the current time
        ask(open_any_responder(server.url + "#m"), "a")
        assert len(server.bodies) == 5


def test_replies_before_a_failure_are_stored():
    script = [completion("one"), completion("two")]
    connection = Connection(max_concurrency=1)
    with fake_server((500, {}, b""), script=script) as server:
        responder = open_any_responder(server.url + "#m", connection)
        stored = r"\(5 attempts\); what it has answered is stored, and the same command continues"
        with pytest.raises(ModelError, match=stored):
            ask(responder, "a", "b", "c", "d")
        server.answer = completion("late")
        again = Connection(max_concurrency=1)
        responder = open_any_responder(server.url + "#m", again)
        assert ask(responder, "a", "b", "c", "d") == ["one", "two", "late", "late"]
    assert (connection.counts.requests, connection.counts.replies) == (7, 2)
    assert (again.counts.requests, again.counts.cached) == (2, 2)


def test_unusable_replies_are_not_stored():
    script = [completion("one")] + [b"<html>"] * 5
    with fake_server(completion("two"), script=script) as server:
        connection = Connection(max_concurrency=1)
        responder = open_any_responder(server.url + "#m", connection)
        assert ask(responder, "a", "b") == ["one", ""]
        assert (connection.counts.replies, connection.counts.unusable) == (1, 1)
        assert ask(open_any_responder(server.url + "#m"), "a", "b") == ["one", "two"]


def test_cut_and_withheld_replies_are_counted_also_from_the_cache():
    replies = {"a": completion("x", "length"), "b": completion(None, "content_filter")}
    with fake_server(lambda body: replies[body["messages"][-1]["content"]]) as server:
        for _ in range(2):
            connection = Connection()
            ask(open_any_responder(server.url + "#m", connection), "a", "b", "a")
            assert (connection.counts.cut, connection.counts.filtered) == (1, 1)
    assert connection.counts.describe() == (
        "Replies of addresses: 2 from the cache, 1 cut at the token limit, 1 withheld by the "
        "server's filter"
    )


def test_settings_outside_of_the_api_are_not_sent_and_reported(caplog):
    sampling = Sampling(temperature=1.0, seed=1, top_p=0.9, top_k=40, min_p=0.1)
    with fake_server() as server:
        ask(open_any_responder(server.url + "#m"), "a", "b", sampling=sampling)
    assert server.bodies[0].keys() == {
        *("model", "messages", "max_tokens", "temperature", "top_p", "seed")
    }
    assert [caplog.text.count(f"`{name}` is not in OpenAI's API") for name in ("top_k", "min_p")]
    assert "repetition_penalty" not in caplog.text


def test_what_another_machine_gets_is_reported_before_it_is_sent(caplog, monkeypatch):
    """A loopback server stands for the other machine."""
    with fake_server() as server:
        responder = open_api_responder(server.url + "#m", sends="prompts, answers and the rubric")
        ask(responder, "a")
        assert caplog.text == ""
        monkeypatch.setattr(Address, "is_loopback", property(lambda self: False))
        monkeypatch.setattr(
            responder.client, "complete", lambda *_: pytest.fail(caplog.text, pytrace=False)
        )
        with pytest.raises(pytest.fail.Exception) as sent:
            ask(responder, "b", "c")
    size = 2 * len(json.dumps(server.bodies[0]))
    assert (
        f"127.0.0.1 is another machine and gets prompts, answers and the rubric: 2 requests "
        f"({size} bytes) now, and more with further prompts" in str(sent.value)
    )


def test_a_model_that_the_server_does_not_list_is_noted():
    with fake_server(models=["a", "b"]) as server:
        [note] = open_any_responder(server.url + "#c").notes
        assert note == f"{server.url}#c: the server does not list this model (found a, b)"
        assert open_any_responder(server.url + "#a").notes == ()


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (b"<html>", "it begins '<html>'; is this the address of an API? Most end in /v1"),
        ((500, {}, b""), "busy or failed (status 500); start the server"),
        ((401, {}, {"error": "no key"}), "(status 401, no key); give the name of a variable"),
        ({"data": []}, "name one of its models (the server lists none)"),
        ({"data": [{"id": 5}, "m"]}, "name one of its models (the server lists none)"),
        ((404, {}, b""), "name one of its models (the server lists none)"),
    ],
)
def test_a_server_without_a_readable_list_of_models_is_one_error(models, message):
    with fake_server() as server, pytest.raises(DPOError) as error:
        server.models = models
        open_any_responder(server.url)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_address_without_v1_is_pointed_out():
    with fake_server() as server, pytest.raises(ConfigError, match=r"most addresses end in /v1"):
        server.models = (404, {}, b"")
        open_any_responder(server.url.removesuffix("/v1"))


def test_a_server_without_a_list_answers_a_named_model():
    with fake_server() as server:
        server.models = (404, {}, b"")
        responder = open_any_responder(server.url + "#m")
        assert responder.notes == () and ask(responder, "a") == ["You wrote: a"]


def test_a_server_that_is_not_there_is_one_error():
    with fake_server() as server:
        pass
    with pytest.raises(ModelError, match=r"no answer \(.*\); start the server, or fix the address"):
        open_any_responder(server.url + "#m")
