"""Answers under two system prompts: the conversations, the rows, and what makes no pair."""

import json

import pytest

from mlx_dpo.collect.contrastive_pairs import ContrastiveTaskSampler, collect_contrastive
from mlx_dpo.collect.pairs_file import PairsFile
from mlx_dpo.collect.system_contrast import SystemContrast, SystemPrompts, put_before
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.prompts import add_system_prompt, make_prompt
from mlx_dpo.errors import ConfigError
from mlx_dpo.evaluation.rewards import RewardFunction
from mlx_dpo.saved_runs.respond import derive_seed
from tests.collect.fake_responders import ScriptedResponder

PROMPTS = [make_prompt("p"), make_prompt("q")]
SAMPLING = Sampling(temperature=1.0, seed=5)
BOTH = SystemPrompts("Be kind.", "Be rude.")


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def script(messages):
    first = messages[0]["content"] if messages[0]["role"] == "system" else "plain"
    return f"{messages[-1]['content']}: {first}"


def collect(folder, systems=BOTH, *, reply=script, prompts=PROMPTS, judge=None):
    responder = ScriptedResponder(reply)
    sampler = SystemContrast(responder, SAMPLING, systems)
    pairs_file = PairsFile(folder / "pairs.jsonl")
    tasks = ContrastiveTaskSampler(prompts, pairs_file, sampler, systems.rule, chunk_size=2)
    list(collect_contrastive(tasks, judge))
    return responder, rows(folder / "pairs.jsonl"), rows(folder / "pairs.passed.jsonl")


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_answers_are_sampled_under_both_system_prompts_and_stored_without_them(tmp_path):
    responder, pairs, skipped = collect(tmp_path)
    assert responder.conversations == [
        [system(text), user(name)] for text in ("Be kind.", "Be rude.") for name in "pq"
    ]
    assert [sampling.seed for sampling in responder.samplings] == [
        derive_seed(5, 0, 0),
        derive_seed(5, 0, 1),
    ]
    assert [row["prompt"] for row in pairs] == [[user("p")], [user("q")]]
    assert pairs[0]["chosen"][0]["content"] == "p: Be kind."
    assert pairs[0]["rejected"][0]["content"] == "p: Be rude."
    provenance = pairs[0]["provenance"]
    assert provenance["by"] == "system prompts"
    assert provenance["chosen_from"]["system"] == "Be kind."
    assert provenance["rejected_from"]["system"] == "Be rude."
    assert skipped == []


def test_one_system_prompt_is_contrasted_with_none(tmp_path):
    responder, pairs, _ = collect(tmp_path, SystemPrompts("Be kind."))
    assert responder.conversations[2:] == [[user("p")], [user("q")]]
    assert pairs[0]["rejected"][0]["content"] == "p: plain"
    assert "system" not in pairs[0]["provenance"]["rejected_from"]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_message_of_the_prompt_stays_after_the_system_prompt(role):
    prompt = make_prompt([{"role": role, "content": "S"}, user("p")])
    put = put_before(prompt, "Be kind.").messages
    assert put == ({"role": role, "content": "Be kind.\n\nS"}, user("p"))
    assert put_before(prompt, None) == prompt


def test_the_system_message_of_a_run_is_in_the_row(tmp_path):
    prompts = add_system_prompt(PROMPTS[:1], "S")
    responder, [row], _ = collect(tmp_path, prompts=prompts)
    assert responder.conversations[1] == [system("Be rude.\n\nS"), user("p")]
    assert row["prompt"] == [system("S"), user("p")]


def test_identical_and_empty_answers_are_dropped_with_the_reason(tmp_path):
    def reply(messages):
        rude = messages[0]["content"] == "Be rude."
        return {"p": "same", "q": "" if rude else "x", "r": "x" if rude else " "}[
            messages[-1]["content"]
        ] + " " * rude

    prompts = [make_prompt(name) for name in "pqr"]
    _, pairs, skipped = collect(tmp_path, reply=reply, prompts=prompts)
    assert pairs == []
    assert [row["passed"] for row in skipped] == [
        "the answer with --system-chosen is the same as the answer with --system-rejected",
        "the answer with --system-rejected is empty",
        "the answer with --system-chosen is empty",
    ]
    assert skipped[0]["answers"] == ["same", "same "]


def test_a_judge_filters_the_pairs(tmp_path):
    judge = RewardFunction("r", lambda prompt, answer: float(answer in ("p: Be kind.", "q: plain")))
    _, [row], [skipped] = collect(tmp_path, SystemPrompts("Be kind."), judge=judge)
    assert (row["prompt"], row["provenance"]["by"]) == ([user("p")], "reward r")
    assert skipped["passed"] == (
        "the answer with --system-chosen is worse than the answer without a system prompt"
    )
    assert skipped["provenance"]["points"] == [0, 1]


def test_thinking_about_the_system_prompt_is_not_in_the_rows(tmp_path):
    _, [row, _], _ = collect(tmp_path, reply=lambda m: f"I am to be so.</think>{script(m)}")
    assert row["chosen"][0]["content"] == "p: Be kind."
    assert row["rejected"][0]["content"] == "p: Be rude."


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ((" ",), "`system_chosen` is empty"),
        (("x", ""), "`system_rejected` is empty"),
        (("x", " x "), "are the same"),
    ],
)
def test_system_prompts_without_a_contrast_are_refused(texts, message):
    with pytest.raises(ConfigError, match=message):
        SystemPrompts(*texts)
