import json

import mlx.core as mx
import mlx_lm
import pytest
from click.testing import CliRunner

from mlx_dpo import ConfigError, RunError, evaluate_run
from mlx_dpo.cli import cli
from mlx_dpo.data.prompts import make_prompt
from mlx_dpo.evaluation.judge import open_judge
from mlx_dpo.evaluation.run_reward import open_run_reward
from mlx_dpo.evaluation.winrate import compare_pairwise
from tests.trained_run import train

PROMPTS = ("What is 3?", "Where is the cat?")
ANSWERS = (("It is 3, friend.", "21 no", "3"), ("On the mat.", "The cat sat on the hat."))


def ask(text):
    return [{"role": "user", "content": text}]


def plain_logp(loaded, messages, answer):
    """Sum the log-probs of an answer and its end token by mlx-lm's model on the whole sequence."""
    model, tokenizer = loaded
    start = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": answer}])
    assert whole[: len(start)] == start
    logits = model(mx.array([whole[:-1]]))[0].astype(mx.float32)
    logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return sum(logps[i, token].item() for i, token in enumerate(whole[1:]) if i + 1 >= len(start))


@pytest.fixture(scope="module")
def sides(trained):
    """The trained policy and the reference, loaded by mlx-lm."""
    base = str(trained / "base")
    return mlx_lm.load(base, adapter_path=str(trained / "run")), mlx_lm.load(base)


def scores(judge, prompts=PROMPTS, answers=ANSWERS):
    return [r.scores for r in judge.rank([ask(text) for text in prompts], answers)]


def expected(sides, system=(), beta=0.1):
    policy, reference = sides
    return [
        tuple(
            beta
            * (
                plain_logp(policy, [*system, *ask(prompt)], answer)
                - plain_logp(reference, [*system, *ask(prompt)], answer)
            )
            for answer in answers
        )
        for prompt, answers in zip(PROMPTS, ANSWERS, strict=True)
    ]


def test_rewards_are_beta_times_the_log_ratio_of_mlx_lms_models(trained, sides):
    judge = open_judge(f"run:{trained}/run", None, None)
    found = scores(judge)
    for row, wanted in zip(found, expected(sides), strict=True):
        assert row == pytest.approx(wanted, abs=2e-5)
    assert max(abs(x) for row in found for x in row) > 0.05  # far from a policy without training
    assert scores(judge) == found  # the adapters are where they were


def test_rewards_of_pairs_are_those_of_eval(trained):
    rows = [json.loads(line) for line in (trained / "pairs.jsonl").read_text().splitlines()]
    judge = open_run_reward(f"run:{trained}/run")
    ranked = judge.rank(
        [ask(row["prompt"]) for row in rows], [(row["chosen"], row["rejected"]) for row in rows]
    )
    metrics = evaluate_run(str(trained / "run"), str(trained / "pairs.jsonl")).metrics
    chosen, rejected = (
        sum(ranking.scores[side] for ranking in ranked) / len(rows) for side in (0, 1)
    )
    assert chosen == pytest.approx(metrics.chosen_rewards, abs=1e-5)
    assert rejected == pytest.approx(metrics.rejected_rewards, abs=1e-5)


def test_the_system_message_of_the_run_comes_before_prompts_without_one(trained, sides, tmp_path):
    train(trained, output=str(tmp_path / "run"), system="Be kind.", beta=0.5)
    judge = open_run_reward(f"run:{tmp_path}/run")
    base = str(trained / "base")
    policy = mlx_lm.load(base, adapter_path=str(tmp_path / "run"))
    system = ({"role": "system", "content": "Be kind."},)
    wanted = expected((policy, sides[1]), system, beta=0.5)
    for row, values in zip(scores(judge), wanted, strict=True):
        assert row == pytest.approx(values, abs=1e-4)
    own = [[*system, *ask(text)] for text in PROMPTS]
    assert [r.scores for r in judge.rank(own, ANSWERS)] == scores(judge)


@pytest.mark.parametrize(("loss", "per_token"), [("cpo", False), ("simpo", True)])
def test_rewards_of_reference_free_losses_are_those_of_the_loss(trained, tmp_path, loss, per_token):
    train(trained, output=str(tmp_path / "run"), loss_type=loss, beta=2.0)
    judge = open_run_reward(f"run:{tmp_path}/run")
    policy = mlx_lm.load(str(trained / "base"), adapter_path=str(tmp_path / "run"))
    for row, prompt, answers in zip(scores(judge), PROMPTS, ANSWERS, strict=True):
        for score, answer in zip(row, answers, strict=True):
            length = len(policy[1].encode(answer, add_special_tokens=False)) + 1
            wanted = 2.0 * plain_logp(policy, ask(prompt), answer) / (length if per_token else 1)
            assert score == pytest.approx(wanted, rel=1e-4)
    assert "without a reference" in judge.provenance()["reward_formula"]


def test_a_moving_reference_and_a_start_adapter_are_the_reference_of_eval(trained, tmp_path):
    pairs = str(trained / "pairs.jsonl")
    more = {"sync_ref_model": True, "ref_model_sync_steps": 3, "ref_model_mixup_alpha": 0.5}
    inherited = {"lora_r": None, "start_adapter": str(trained / "run")}
    for number, changes in enumerate((more, inherited)):
        folder = str(tmp_path / f"run{number}")
        train(trained, output=folder, epochs=2, **changes)
        rewards = open_run_reward(f"run:{folder}").rewards
        rows = [json.loads(line) for line in (trained / "pairs.jsonl").read_text().splitlines()]
        examples = [rewards.tokenize(ask(row["prompt"]), row["chosen"], "here") for row in rows]
        mean = sum(rewards.of_completions(examples)) / len(rows)
        assert mean == pytest.approx(evaluate_run(folder, pairs).metrics.chosen_rewards, abs=1e-5)


def test_an_answer_without_a_reward_ties_and_leaves_the_others_alone(trained):
    judge = open_run_reward(f"run:{trained}/run")
    long = "word " * 600
    answers = [("It is 3, friend.", ""), ("On the mat.", long), ("a", "b")]
    prompts = (*PROMPTS, "Why?")
    empty, cut, whole = judge.rank([ask(text) for text in prompts], answers)
    assert empty.scores == cut.scores == (0, 0)
    assert empty.warnings == ("an answer has no reward: a completion is empty",)
    assert cut.warnings == ("an answer has no reward: the pair is too long",)
    assert not whole.warnings
    [alone] = judge.rank([ask("Why?")], [("a", "b")])
    assert whole.scores == pytest.approx(alone.scores, abs=1e-5)
    with pytest.raises(ConfigError, match="cannot score the answers to any prompt"):
        judge.rank([ask("Why?")], [("", "b")])


def test_a_win_rate_shows_the_mean_rewards_of_answers_that_have_one(trained):
    judge = open_run_reward(f"run:{trained}/run")
    prompts = [make_prompt(text, "here") for text in (*PROMPTS, "Why?")]
    better, worse = ["It is 3, friend.", "a b", "c"], ["21 no", "c", ""]
    comparison = compare_pairwise(judge, prompts, better, worse)
    first, second = scores(judge, PROMPTS, list(zip(better, worse, strict=True))[:2])
    wanted = ((first[0] + second[0]) / 2, (first[1] + second[1]) / 2)
    assert comparison.rewards == pytest.approx(wanted, abs=1e-5)
    assert comparison.rate.ties == 1
    assert dict(comparison.warnings) == {"an answer has no reward: a completion is empty": 1}


def test_the_provenance_names_run_model_and_adapter_by_digest(trained, tmp_path):
    judge = open_run_reward(f"run:{trained}/run")
    source = judge.provenance()
    assert source["by"] == f"reward run:{trained}/run"
    assert source["reward_formula"] == "beta times log π / π_ref, beta = 0.1"
    train(trained, output=str(tmp_path / "run"), learning_rate=2e-3)
    other = open_run_reward(f"run:{tmp_path}/run").provenance()
    assert other["reward_model_digest"] == source["reward_model_digest"]
    assert other["reward_adapter_digest"] != source["reward_adapter_digest"]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"loss_type": "sft"}, ConfigError, "loss_type sft implies no reward"),
        ({"chat_template": "text"}, RunError, "trained on plain text"),
    ],
)
def test_a_run_that_is_no_reward_model_is_refused(trained, tmp_path, settings, error, message):
    train(trained, output=str(tmp_path / "run"), max_steps=1, epochs=None, **settings)
    with pytest.raises(error, match=message):
        open_run_reward(f"run:{tmp_path}/run")


def test_a_missing_folder_is_an_error_of_one_line(tmp_path):
    for spec, error, message in (
        ("run:", ConfigError, "needs a run folder"),
        (f"run:{tmp_path}/none", RunError, "none"),
    ):
        with pytest.raises(error, match=message):
            open_judge(spec, None, None)


def test_collected_pairs_and_win_rates_are_those_of_the_runs_rewards(trained, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    run, pairs = str(trained / "run"), tmp_path / "pairs.jsonl"
    given = ["--prompts", str(tmp_path / "prompts.txt"), "--reward", f"run:{run}"]
    more = ["--answers", "3", "--max-tokens", "6", "--temperature", "1", "--seed", "1"]
    result = CliRunner().invoke(cli, ["collect", run, *given, *more, "--output", str(pairs)])
    assert result.exit_code == 0, result.output
    judge = open_run_reward(f"run:{run}")
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        texts = [row[name][0]["content"] for name in ("chosen", "rejected")]
        [ranking] = judge.rank([row["prompt"]], [texts])
        points = row["provenance"]["points"]
        assert ranking.scores == pytest.approx((max(points), min(points)), abs=1e-5)
        source = judge.provenance()
        assert {name: row["provenance"][name] for name in source} == source
    sampling = ["--max-tokens", "6", "--temperature", "0", "--json"]
    result = CliRunner().invoke(cli, ["winrate", run, *given, *sampling])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["by"] == f"reward run:{run}"
    assert figures["mean_rewards"] is not None
    assert figures["wins"] + figures["ties"] + figures["losses"] == len(PROMPTS)
