import json

import pytest
from click.testing import CliRunner

from mlx_dpo.cli import cli
from mlx_dpo.evaluation.best_of import BestOf
from mlx_dpo.evaluation.run_reward import open_run_reward
from mlx_dpo.generation.batch import GeneratedText, GeneratedTokens
from tests.trained_run import train

REWARD = "def length(prompt, answer):\n    return len(answer)\n"
SHORT = ("--max-tokens", "6", "--seed", "3")


def generate(*arguments):
    return CliRunner().invoke(cli, ["generate", *map(str, arguments)])


def best_of(count, *arguments):
    result = generate(*arguments, "--best-of", count, *SHORT, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def rate(run, answers, system=()):
    judge = open_run_reward(f"run:{run}")
    prompt = [*system, {"role": "user", "content": "Who?"}]
    return [
        ranking.scores[0] for ranking in judge.rank([prompt] * len(answers), [[a] for a in answers])
    ]


def test_the_answer_with_the_highest_implicit_reward_of_the_run_is_printed(trained):
    found = best_of(5, trained / "run", "Who?")
    answers = found["completions"]
    assert len(set(answers)) == 5
    assert found["rewards"] == pytest.approx(rate(trained / "run", answers), abs=1e-5)
    assert found["reward"] == max(found["rewards"])
    assert found["completion"] == answers[found["rewards"].index(max(found["rewards"]))]
    assert found["settings"]["temperature"] == 1.0
    assert found["provenance"]["by"] == f"reward run:{trained}/run"
    text = generate(trained / "run", "Who?", "--best-of", 5, *SHORT)
    assert text.stdout == found["completion"] + "\n"
    assert "best of 5 answers (5 different): reward" in text.stderr
    cut = "5 of the answers were cut before their end"
    assert (cut in text.stderr) == (found["finish_reason"] == "length")


def test_the_seed_repeats_all_answers_and_another_one_does_not(trained):
    first, again = (best_of(3, trained / "run", "Who?")["completions"] for _ in range(2))
    assert first == again
    other = generate(trained / "run", "Who?", "--best-of", 3, "--json", "--max-tokens", 6)
    seed = json.loads(other.stdout)["settings"]["seed"]
    assert json.loads(other.stdout)["completions"] != first
    more = ("--max-tokens", 6, "--seed", seed)
    repeated = generate(trained / "run", "Who?", "--best-of", 3, "--json", *more)
    assert json.loads(repeated.stdout)["completions"] == json.loads(other.stdout)["completions"]


def test_answers_of_the_base_are_rated_by_the_run(trained):
    found = best_of(3, trained / "run", "Who?", "--base")
    plain = best_of(3, "--model", trained / "base", "Who?", "--reward", f"run:{trained}/run")
    assert found["completions"] == plain["completions"]
    assert found["rewards"] == pytest.approx(rate(trained / "run", found["completions"]), abs=1e-5)
    assert found["completions"] != best_of(3, trained / "run", "Who?")["completions"]
    assert plain["rewards"] == pytest.approx(found["rewards"], abs=1e-5)


def test_the_system_message_of_the_run_is_before_the_rated_prompt(trained, tmp_path):
    train(trained, output=str(tmp_path / "run"), system="Be kind.", max_steps=8, epochs=None)
    found = best_of(3, tmp_path / "run", "Who?")
    system = ({"role": "system", "content": "Be kind."},)
    wanted = rate(tmp_path / "run", found["completions"], system)
    assert found["rewards"] == pytest.approx(wanted, abs=1e-5)
    own = ({"role": "system", "content": "Be brief."},)
    found = best_of(3, tmp_path / "run", "Who?", "--system", "Be brief.")
    wanted = rate(tmp_path / "run", found["completions"], own)
    assert found["rewards"] == pytest.approx(wanted, abs=1e-5)


def test_a_reward_function_rates_the_answers_of_a_model(trained, tmp_path):
    (tmp_path / "rewards.py").write_text(REWARD)
    reward = ("--reward", f"{tmp_path}/rewards.py:length")
    found = best_of(4, "--model", trained / "base", "Who?", *reward)
    assert found["rewards"] == [len(text) for text in found["completions"]]
    assert len(found["completion"]) == max(found["rewards"])


def reply(text, stop=1):
    return GeneratedText(text, GeneratedTokens([2, 3], stop))


def test_ties_cut_answers_and_answers_without_a_reward_are_named():
    replies = [reply("a"), reply("b"), reply("a"), reply(""), reply("c", None)]
    best = BestOf(replies, [2.0, 2.0, 2.0, None, -1.0], 0)
    assert best.answer.text == "a"
    assert best.notes() == [
        "best of 5 answers (4 different): reward 2, mean 1.25, lowest -1",
        "2 different answers tie for the best; this is the first of them",
        "1 of the answers were cut before their end",
        "1 of the answers are empty or too long for a reward",
    ]
    assert len(BestOf([reply("a"), reply("a")], [1.0, 1.0], 0).notes()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reward", "r.py:f"], "`reward` has no effect without --best-of"),
        (["--best-of", "2", "--raw"], "`best_of` rates the answers of a chat; leave out --raw"),
        (["--best-of", "2", "--temperature", "0"], "`temperature` 0 gives the same answer"),
        (["--best-of", "2"], "missing reward: name a run, or pass --reward FILE:FUNCTION or"),
    ],
)
def test_flags_that_contradict_each_other_are_an_error_of_one_line(arguments, message):
    result = generate("--model", "no/such-model", *arguments, "hi")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"Error: {message}")


def test_one_answer_is_no_choice():
    result = generate("--model", "m", "--best-of", 1, "hi")
    assert result.exit_code == 2
    assert "x>=2" in result.stderr
