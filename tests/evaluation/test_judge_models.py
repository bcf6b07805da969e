"""A model opened as judge."""

from types import SimpleNamespace

from mlx_dpo.evaluation import judge as judges
from mlx_dpo.evaluation.judge import NO_VERDICT


class Thinker:
    """A tokenizer whose template begins to think; it has one token."""

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


def judged(monkeypatch, said):
    voice = SimpleNamespace(
        base=SimpleNamespace(tokenizer=Thinker()),
        facts={"model_digest": "x"},
        answer=lambda conversations, sampling: [said] * len(conversations),
    )
    monkeypatch.setattr(judges, "open_responder", lambda run, *, model: voice)
    judge = judges.open_judge(None, "m", None)
    [ranking] = judge.rank([[{"role": "user", "content": "hi"}]], [["one", "other"]])
    return ranking


def test_a_judge_that_was_cut_while_it_thought_gave_no_verdict(monkeypatch):
    """Its prompt has begun the thought: nothing in the text says that it is one."""
    assert judged(monkeypatch, "[[C]]? Perhaps. But then").doubts == (NO_VERDICT,)
    assert judged(monkeypatch, "[[A]]?</t>[[C]]").doubts == ()
