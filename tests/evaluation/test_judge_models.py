"""A model opened as judge."""

from types import SimpleNamespace

from mlx_dpo.evaluation import judge as judge_module
from mlx_dpo.evaluation.judge import NO_VERDICT
from mlx_dpo.saved_runs.respond import ModelResponder


class ThinkingTokenizer:
    """A tokenizer with one token, whose template opens the thinking at the end of the prompt."""

    has_chat_template = has_thinking = True
    think_start, think_end = "<t>", "</t>"
    all_special_tokens, eos_token_ids, added_tokens_decoder = (), {0}, {}

    def convert_ids_to_tokens(self, number):
        return "<end>"

    def apply_chat_template(self, messages, **_):
        return [1]

    def rfind_think_start(self, tokens):
        return 0

    def rfind_think_end(self, tokens):
        return -1


def rank_with_reply(monkeypatch, reply):
    responder = ModelResponder(
        SimpleNamespace(tokenizer=ThinkingTokenizer()), {"model_digest": "x"}
    )
    monkeypatch.setattr(
        ModelResponder,
        "answer",
        lambda self, conversations, sampling, name: [reply] * len(conversations),
    )
    monkeypatch.setattr(judge_module, "open_any_responder", lambda spec, *_, **__: responder)
    judge = judge_module.open_judge(None, "m", None)
    [ranking] = judge.rank([[{"role": "user", "content": "hi"}]], [["one", "other"]])
    return ranking


def test_a_judge_that_was_cut_while_thinking_gave_no_verdict(monkeypatch):
    """The prompt opens the thinking, so the reply contains no start mark."""
    assert rank_with_reply(monkeypatch, "[[C]]? Perhaps. But then").warnings == (NO_VERDICT,)
    assert rank_with_reply(monkeypatch, "[[A]]?</t>[[C]]").warnings == ()
