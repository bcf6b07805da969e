"""Pairs of the rounds of iterative DPO by principles: draws, judge, critic, and their digests."""

import json

import pytest

from mlx_dpo.collect.iterative.collect_pairs import PairCollector
from mlx_dpo.collect.iterative.folder import IterativeSettings
from mlx_dpo.collect.pairs_file import PairsFile
from mlx_dpo.data.prompts import make_prompt
from mlx_dpo.errors import ConfigError
from tests.collect.fake_responders import ScriptedResponder

PROMPTS = [make_prompt(f"q{n}") for n in range(24)]


def answer(messages):
    """Answer, criticise and revise; as a judge, prefer the revision."""
    text = messages[-1]["content"]
    if "[Answer A]" in text:
        return "[[A]]" if "[Answer A]\nrevised" in text else "[[B]]"
    if text.startswith("Criticise"):
        return "Too long."
    return "revised" if text.startswith("Write") else "first"


@pytest.fixture
def principles(tmp_path):
    path = tmp_path / "principles.txt"
    path.write_text(
        "".join(f"An answer is {name}.\n" for name in ("kind", "short", "true", "fair"))
    )
    return str(path)


def make_collector(principles, **settings):
    initial = ScriptedResponder(answer, model="initial")
    settings = IterativeSettings(prompts="p.txt", principles=principles, **settings)
    return PairCollector(settings, lambda: initial), initial


def collect(collector, round_number, folder):
    pairs_file = PairsFile(folder / f"{round_number}.jsonl")
    policy = ScriptedResponder(answer, model=f"policy {round_number}")
    remaining = list(collector.collect(round_number, policy, PROMPTS, pairs_file))
    rows = [json.loads(line) for line in pairs_file.path.read_text().splitlines()]
    return remaining, [row["provenance"] for row in rows]


def drawn(provenances):
    return [source["chosen_from"]["revisions"][0]["principle"] for source in provenances]


def test_the_initial_policy_judges_all_rounds_by_the_principles_of_each(tmp_path, principles):
    collector, initial = make_collector(principles)
    rounds = []
    for number in (1, 2):
        initial.conversations.clear()
        remaining, provenances = collect(collector, number, tmp_path)
        assert remaining == list(range(24, -1, -1))
        assert {source["by"] for source in provenances} == {"judge initial"}
        assert {source["chosen_from"]["model"] for source in provenances} == {f"policy {number}"}
        rounds.append(drawn(provenances))
        questions = [message["content"] for [message] in initial.conversations]
        for index, text in enumerate(rounds[-1]):
            for question in questions[2 * index : 2 * index + 2]:
                assert f"follows this better:\n\n{text}\n\n" in question
    assert len(set(rounds[0])) == 4
    assert rounds[0] != rounds[1]


def test_another_critic_and_several_revisions(tmp_path, principles, monkeypatch):
    critic = ScriptedResponder(lambda messages: "So so.", model="critic")
    monkeypatch.setattr(
        "mlx_dpo.collect.iterative.collect_pairs.open_any_responder", lambda *a, **how: critic
    )
    collector, _ = make_collector(principles, critic="critic", revisions=2)
    _, [source, *_] = collect(collector, 1, tmp_path)
    steps = source["chosen_from"]["revisions"]
    assert [step["critique"] for step in steps] == ["So so.", "So so."]
    assert collector.input_digests()["the critic"] == critic.provenance


def test_a_resume_compares_judge_and_principles(principles):
    digests = make_collector(principles)[0].input_digests()
    assert digests["the judge"]["judge_digest"] == "digest of initial"
    assert make_collector(principles)[0].input_digests() == digests
    with open(principles, "a", encoding="utf-8") as file:
        file.write("An answer is plain.\n")
    changed = make_collector(principles)[0].input_digests()
    assert changed["the principles"] != digests["the principles"]
    assert changed["the judge"] == digests["the judge"]


def test_a_round_without_a_pair_is_an_error_with_the_reasons(tmp_path, principles):
    collector, initial = make_collector(principles)
    initial.script = lambda messages: "[[C]]"
    with pytest.raises(ConfigError, match=r"is no better than the first answer: 24.*principles"):
        collect(collector, 1, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"principles": None, "revisions": 2, "judge": "j"}, "`revisions` has no effect without"),
        ({"principles": None, "critic": "c", "judge": "j"}, "`critic` has no effect without"),
        ({"principles": None}, "missing judge: pass --reward or --judge"),
        ({"revisions": 5}, "`revisions` 5 needs 5 principles"),
        ({"reward": "r", "rubric": "x"}, "`rubric` has no effect"),
    ],
)
def test_settings_without_effect_are_refused(principles, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_collector(**{"principles": principles} | settings)
