"""Critique and revision of answers: the conversations, their seeds, faults and provenance."""

import json

import pytest

from mlx_dpo.collect.contrastive_pairs import ContrastiveTaskSampler, collect_contrastive
from mlx_dpo.collect.pairs_file import PairsFile
from mlx_dpo.collect.principles.judge import judge_drawn, open_principle_judge
from mlx_dpo.collect.principles.principle_set import Principle, PrincipleDraw
from mlx_dpo.collect.principles.revise import REVISION_RULE, Reviser
from mlx_dpo.collect.session import Answer, RankingTask
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.prompts import add_system_prompt, make_prompt
from mlx_dpo.errors import ConfigError
from mlx_dpo.evaluation.rewards import Ranking
from mlx_dpo.saved_runs.respond import derive_seed
from tests.collect.fake_responders import ScriptedResponder

KIND = Principle("An answer is kind.", "Criticise: {principle}", "Revise: {principle}")
SHORT = Principle("An answer is short.", "Criticise: {principle}", "Revise: {principle}")
PROMPTS = [make_prompt("p", "file:1"), make_prompt("q", "file:2")]
SAMPLING = Sampling(temperature=1.0, seed=5)


def script(messages):
    """Return `answer`, `critique N` or `revision N` for a conversation."""
    last = messages[-1]["content"]
    if last.startswith("Criticise"):
        return f"Too {last[-6:-1]}?"
    return f"{messages[-4]['content']}+" if last.startswith("Revise") else f"<{last}>"


def sample(
    reply=script,
    *,
    principles=(KIND,),
    prompts=PROMPTS,
    critic=None,
    chunk=0,
    temperature=0.0,
    **more,
):
    responder = ScriptedResponder(reply, **more)
    draw = PrincipleDraw(principles, len(principles))
    reviser = Reviser(responder, draw, SAMPLING, critic, temperature)
    return responder, reviser(prompts, chunk)


def turns(*texts, system=None):
    roles = ["user", "assistant"] * len(texts)
    first = [{"role": "system", "content": system}] if system else []
    return first + [
        {"role": role, "content": text} for role, text in zip(roles, texts, strict=False)
    ]


def test_critique_and_revision_continue_the_conversation():
    responder, answers = sample(prompts=add_system_prompt(PROMPTS[:1], "S"))
    criticise, revise = "Criticise: An answer is kind.", "Revise: An answer is kind."
    assert responder.conversations == [
        turns("p", system="S"),
        turns("p", "<p>", criticise, system="S"),
        turns("p", "<p>", criticise, "Too  kind?", revise, system="S"),
    ]
    assert [[answer.text for answer in pair] for pair in answers] == [["<p>+", "<p>"]]


def test_a_further_revision_begins_anew_with_the_revised_answer_and_another_principle():
    responder, [[last, first]] = sample(principles=(KIND, SHORT), prompts=PROMPTS[:1])
    drawn = PrincipleDraw((KIND, SHORT), 2).for_prompt(PROMPTS[0].messages)
    assert responder.conversations[3] == turns("p", "<p>+", drawn[1].critique_request)
    assert (last.text, first.text) == ("<p>++", "<p>")
    assert last.source["revisions"] == [
        {
            "principle": principle.text,
            "critique": f"Too {principle.text[-6:-1]}?",
            "revision": f"<p>{'+' * number}",
        }
        for number, principle in enumerate(drawn, start=1)
    ]
    assert "revisions" not in first.source


def test_critiques_and_revisions_are_greedy_unless_they_have_a_temperature():
    responder, _ = sample()
    first, *others = responder.samplings
    assert first == Sampling(temperature=1.0, seed=derive_seed(5, 0, 0))
    assert others == [Sampling(max_tokens=SAMPLING.max_tokens)] * 2
    responder, _ = sample(temperature=0.5)
    assert [sampling.temperature for sampling in responder.samplings] == [1.0, 0.5, 0.5]


def test_every_step_has_its_own_seed_by_chunk():
    responder, _ = sample(principles=(KIND, SHORT), chunk=3, temperature=0.5)
    seeds = [sampling.seed for sampling in responder.samplings]
    assert seeds == [derive_seed(5, 3, 0), *(derive_seed(0, 3, n) for n in range(1, 5))]
    assert len(set(seeds)) == 5


def test_a_critic_criticises_and_the_model_revises():
    critic = ScriptedResponder(lambda messages: "Rude.", model="critic")
    responder, [[last, _], _] = sample(critic=critic)
    assert critic.conversations == [
        turns(text, f"<{text}>", "Criticise: An answer is kind.") for text in "pq"
    ]
    assert len(responder.conversations) == 4
    assert last.source["critic"] == critic.provenance
    assert last.source["model"] == "m"
    assert last.source["revisions"][0]["critique"] == "Rude."


def test_thinking_is_in_no_conversation_and_in_no_answer():
    responder, [[last, first], _] = sample(lambda messages: f"hm</think>{script(messages)}")
    assert (last.text, first.text) == ("<p>+", "<p>")
    assert "think" not in json.dumps(responder.conversations)


def fault(reply, *, principles=(KIND,), **more):
    _, [answers] = sample(reply, principles=principles, prompts=PROMPTS[:1], **more)
    return REVISION_RULE.find_fault(answers)


def replying(**replies):
    """Return a script with other replies to a first question, a critique or a revision request."""

    def reply(messages):
        kind = messages[-1]["content"].split(":")[0]
        return replies.get(kind, script(messages))

    return reply


@pytest.mark.parametrize(
    ("reply", "room", "expected"),
    [
        (script, 99, None),
        (replying(p=" "), 99, "the first answer is empty"),
        (replying(Criticise=" \n"), 99, "the critique is empty"),
        (replying(Revise=""), 99, "the revision is empty"),
        (replying(Revise=" <p> "), 99, "the revision is the same as the first answer"),
        (script, 2, "no room in the model's context for a critique and a revision"),
        (script, 4, "no room in the model's context for a critique and a revision"),
    ],
)
def test_what_makes_no_pair_has_a_reason(reply, room, expected):
    assert fault(reply, room=room) == expected


def test_an_empty_answer_is_not_criticised():
    responder, _ = sample(replying(p=""))
    assert [turns[0]["content"] for turns in responder.conversations] == ["p", "q", "q", "q"]


def test_a_step_that_fails_is_left_out():
    """The second of two revisions is empty: the first one stands."""

    def reply(messages):
        return "" if messages[1:2] and messages[1]["content"] == "<p>+" else script(messages)

    _, [[last, _]] = sample(reply, principles=(KIND, SHORT), prompts=PROMPTS[:1])
    assert (last.text, last.fault, len(last.source["revisions"])) == ("<p>+", None, 1)


def collect(tmp_path, reply, *, judge=None, prompts=PROMPTS, reward=None):
    responder = ScriptedResponder(reply)
    draw = PrincipleDraw((KIND, SHORT))
    pairs_file = PairsFile(tmp_path / "pairs.jsonl")
    reviser = Reviser(responder, draw, SAMPLING)
    tasks = ContrastiveTaskSampler(prompts, pairs_file, reviser, REVISION_RULE, chunk_size=2)
    opened = open_principle_judge(reward, None, None, None, ScriptedResponder(judge, model="j"))
    return tasks, collect_contrastive(tasks, judge_drawn(opened, draw))


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def prefer_the_longer(messages):
    text = messages[0]["content"]
    first = text.split("[Answer A]\n")[1].split("\n[End")[0]
    second = text.split("[Answer B]\n")[1].split("\n[End")[0]
    return "[[A]]" if len(first) > len(second) else "[[B]]"


def prefer_the_shorter(messages):
    return {"[[A]]": "[[B]]", "[[B]]": "[[A]]"}[prefer_the_longer(messages)]


def test_the_model_judges_by_the_drawn_principle_and_the_row_has_all_of_it(tmp_path):
    asked = []
    _, decisions = collect(
        tmp_path,
        script,
        judge=lambda messages: asked.append(messages) or prefer_the_longer(messages),
    )
    assert len(list(decisions)) == 2
    for number, prompt in enumerate(PROMPTS):
        [principle] = PrincipleDraw((KIND, SHORT)).for_prompt(prompt.messages)
        for [message] in asked[2 * number : 2 * number + 2]:
            assert f"follows this better:\n\n{principle.text}\n" in message["content"]
    row = rows(tmp_path / "pairs.jsonl")[1]
    assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == ("<q>+", "<q>")
    provenance = row["provenance"]
    assert provenance["by"] == "judge j"
    assert provenance["judge_digest"] == "digest of j"
    assert provenance["points"] == [1, 0] and len(provenance["judge_replies"]) == 2
    assert provenance["chosen_from"]["revisions"][0]["principle"] == principle.text


def test_a_revision_that_is_no_better_is_dropped_with_the_reason_and_the_steps(tmp_path):
    verdicts = iter(["[[A]]", "[[A]]"])  # for the second prompt: the judge prefers a position

    def judge(messages):
        is_first_prompt = "\np\n" in messages[0]["content"]
        return prefer_the_shorter(messages) if is_first_prompt else next(verdicts)

    _, decisions = collect(tmp_path, script, judge=judge)
    assert len(list(decisions)) == 2
    assert rows(tmp_path / "pairs.jsonl") == []
    worse, doubtful = rows(tmp_path / "pairs.passed.jsonl")
    assert worse["passed"] == "the revision is worse than the first answer"
    assert doubtful["passed"] == "the two orders disagree"
    revised, first = worse["provenance"]["answers_from"]
    assert revised["revisions"][0]["critique"] and "revisions" not in first
    assert worse["answers"] == ["<p>+", "<p>"]


def test_a_preference_that_the_judge_doubts_is_no_pair():
    answers = (Answer("better", {}), Answer("worse", {}))
    task, ranking = RankingTask(PROMPTS[0], answers), Ranking((1.0, 0.0), warnings=("odd",))
    decision = REVISION_RULE.decide(task, ranking, {"by": "judge j"})
    assert (decision.chosen, decision.skip_reason) == (None, "odd")


def test_a_tie_is_no_pair(tmp_path):
    _, decisions = collect(tmp_path, script, judge=lambda messages: "[[C]]")
    list(decisions)
    reasons = {row["passed"] for row in rows(tmp_path / "pairs.passed.jsonl")}
    assert reasons == {"the revision is no better than the first answer"}


def test_a_reward_is_a_judge(tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text("def plus(prompt, answer):\n    return answer.count('+')\n")
    _, decisions = collect(tmp_path, script, reward=f"{reward}:plus")
    assert [decision.provenance["points"] for decision in decisions] == [[1, 0], [1, 0]]
    with pytest.raises(ConfigError, match="`rubric` has no effect"):
        open_principle_judge(f"{reward}:plus", None, "rubric.txt", None, ScriptedResponder(script))


def test_an_interrupted_collection_ends_with_the_same_pairs(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    prompts = [make_prompt(f"p{n}") for n in range(5)]
    for folder in (whole, parts):
        folder.mkdir()
    list(collect(whole, script, judge=prefer_the_longer, prompts=prompts)[1])
    for _ in range(6):
        tasks, decisions = collect(parts, script, judge=prefer_the_longer, prompts=prompts)
        next(decisions, None)  # one decision, then the program ends
    assert tasks.remaining == 0

    def content(folder):
        read = rows(folder / "pairs.jsonl")
        return [{**row, "provenance": {**row["provenance"], "time": None}} for row in read]

    assert content(parts) == content(whole)
