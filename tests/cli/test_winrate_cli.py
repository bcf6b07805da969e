import json

import mlx_lm
import pytest
from click.testing import CliRunner

from mlx_dpo.cli import cli
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.evaluation.winrate import wilson_interval
from mlx_dpo.generation.batch import generate_batch
from tests.checkpoints import leave_out_system_messages, make_checkpoint

REWARD = """\
def length(prompt, answer):
    return len(answer)


def even(prompt, answer):
    return 0
"""
GREEDY = ("--max-tokens", "8", "--temperature", "0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, a run with changed answers, prompts and rewards."""
    folder = tmp_path_factory.mktemp("winrate")
    make_checkpoint(folder / "base")
    pairs = [
        {"prompt": f"What is {n}?", "chosen": "the house on the hill is there", "rejected": "no"}
        for n in range(20)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "reward.py").write_text(REWARD)
    (folder / "one.txt").write_text("Where is the cat?\n")
    (folder / "prompts.txt").write_text("Where is the cat?\nWho sat?\nWhy?\n")
    command = ["train", str(folder / "pairs.jsonl"), "--model", str(folder / "base")]
    command += ["--output", str(folder / "run"), "--learning-rate", "0.05", "--batch-size", "4"]
    result = CliRunner().invoke(cli, [*command, "--valid-fraction", "0.25"])
    assert result.exit_code == 0, result.output
    return folder


def run(folder, *arguments):
    return CliRunner().invoke(cli, ["winrate", str(folder / "run"), *arguments])


def reward(folder, name="length"):
    return ("--reward", f"{folder}/reward.py:{name}")


def answers(folder, prompts, adapter=None):
    path = None if adapter is None else str(adapter)
    model, tokenizer = mlx_lm.load(str(folder / "base"), adapter_path=path)
    conversations = [[{"role": "user", "content": text}] for text in prompts]
    return generate_batch(
        model, tokenizer, conversations, sampling=Sampling(max_tokens=8), context=None
    )


def test_base_and_aligned_are_compared_on_the_answers_of_mlx_lm(folder):
    prompts = (folder / "prompts.txt").read_text().splitlines()
    result = run(folder, str(folder / "prompts.txt"), *reward(folder), *GREEDY, "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    aligned, base = answers(folder, prompts, folder / "run"), answers(folder, prompts)
    outcomes = [
        1.0 if len(a) > len(b) else 0.5 if len(a) == len(b) else 0.0
        for a, b in zip(aligned, base, strict=True)
    ]
    assert figures["win_rate"] == pytest.approx(sum(outcomes) / 3)
    assert figures["interval_95"] == pytest.approx(wilson_interval(sum(outcomes), 3))
    assert figures["mean_rewards"] == pytest.approx(
        [sum(map(len, aligned)) / 3, sum(map(len, base)) / 3]
    )
    assert (figures["prompts"], figures["judged"]) == (3, 3)


def test_without_prompts_the_held_out_prompts_are_used(folder):
    result = run(folder, *reward(folder), *GREEDY, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["prompts"] == 5


def test_against_itself_a_run_ties_everywhere(folder):
    against = ("--against", str(folder / "run"))
    result = run(folder, *reward(folder), *GREEDY, *against, "--json")
    figures = json.loads(result.stdout)
    assert (figures["wins"], figures["ties"], figures["losses"]) == (0, 5, 0)
    assert figures["length_controlled_win_rate"] is None
    assert figures["against"] == str(folder / "run")


def test_the_table_shows_ties_and_the_interval(folder):
    result = run(folder, *reward(folder, "even"), *GREEDY)
    assert result.exit_code == 0, result.output
    assert "5 prompts, against its reference" in result.stdout
    assert "0, 5, 0" in " ".join(result.stdout.split())
    assert "95 % interval (Wilson)" in result.stdout
    assert "50.0%" in result.stdout
    warning = "Warning: the reward gave every answer the same score (0.0), so the win rate says"
    assert warning in result.stderr
    assert "the same score" not in run(folder, *reward(folder), *GREEDY).stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "missing judge: pass --reward FILE:FUNCTION, --reward run:RUN or --judge MODEL"),
        (
            ["{folder}/one.txt", "--judge", "{base}"],
            "the judge gave no verdict on any prompt (its reply was",
        ),
        (["--reward", "{f}:length", "--top-k", "3"], "`top_k` has no effect with `temperature` 0"),
        (["--reward", "{f}:length", "--against", "{folder}/none"], "none"),
    ],
)
def test_invalid_settings_give_a_one_line_error(folder, more, message):
    names = {"{base}": f"{folder}/base", "{f}": f"{folder}/reward.py", "{folder}": str(folder)}
    for name, value in names.items():
        more = [word.replace(name, value) for word in more]
    result = run(folder, *GREEDY, *more)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr.splitlines()[-1]


def answers_under(folder, system, prompts):
    model, tokenizer = mlx_lm.load(str(folder / "base"))
    conversations = [
        [{"role": "system", "content": system}, {"role": "user", "content": text}]
        for text in prompts
    ]
    sampling = Sampling(max_tokens=8)
    return generate_batch(model, tokenizer, conversations, sampling=sampling, context=None)


def test_the_opponent_is_the_reference_under_a_system_prompt(folder):
    prompts = (folder / "prompts.txt").read_text().splitlines()
    file = folder / "system.txt"
    file.write_text("Be the cat on the mat.\n")
    words = [str(folder / "prompts.txt"), *reward(folder), *GREEDY, "--json"]
    figures = [
        json.loads(run(folder, *words, "--against-system", text).stdout)
        for text in ("Be the cat on the mat.", f"@{file}")
    ]
    assert figures[0] == figures[1]
    assert figures[0]["against_system"] == "Be the cat on the mat."
    base = answers_under(folder, "Be the cat on the mat.", prompts)
    assert base != answers(folder, prompts)  # the system prompt changes something
    aligned = answers(folder, prompts, folder / "run")  # without the system prompt
    lengths = [sum(map(len, texts)) / 3 for texts in (aligned, base)]
    assert figures[0]["mean_rewards"] == pytest.approx(lengths)


def test_the_system_message_of_the_run_is_not_the_opponents(folder, tmp_path):
    command = ["train", str(folder / "pairs.jsonl"), "--model", str(folder / "base")]
    command += ["--output", str(tmp_path / "run"), "--system", "Be a hat.", "--max-steps", "2"]
    trained = CliRunner().invoke(cli, command)
    assert trained.exit_code == 0, trained.output
    words = ["winrate", str(tmp_path / "run"), str(folder / "one.txt"), *reward(folder), *GREEDY]
    for more, system in ((("--against-system", "Be a cat."), "Be a cat."), ((), "Be a hat.")):
        result = CliRunner().invoke(cli, [*words, *more, "--json"])
        assert result.exit_code == 0, result.output
        [answer] = answers_under(folder, system, ["Where is the cat?"])
        assert json.loads(result.stdout)["mean_rewards"][1] == len(answer)


def test_a_prompt_keeps_its_own_system_message_below_the_opponents(folder):
    turns = [{"role": "system", "content": "Be a hat."}, {"role": "user", "content": "Why?"}]
    file = folder / "own.jsonl"
    file.write_text(json.dumps({"prompt": turns}) + "\n")
    system = ("--against-system", "Be a cat.")
    result = run(folder, str(file), *reward(folder), *GREEDY, "--json", *system)
    assert result.exit_code == 0, result.output
    [answer] = answers_under(folder, "Be a cat.\n\nBe a hat.", ["Why?"])
    assert json.loads(result.stdout)["mean_rewards"][1] == len(answer)


def test_the_title_names_the_system_prompt(folder):
    words = [*reward(folder), *GREEDY, "--against-system"]
    shown = run(folder, *words, "Be a cat.").stdout
    assert "against its reference with the system prompt “Be a cat.”" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("system", "message"),
    [
        ("no-such.txt", "`no-such.txt` is the name of a file; write `@no-such.txt` to read"),
        ("{folder}/prompts.txt", "prompts.txt` is the name of a file; write `@"),
        ("{folder}/run/run.json", "run.json` is the name of a file; write `@"),
        ("@gone", "gone: no such file"),
        (" ", "`against_system` is empty"),
    ],
)
def test_a_wrong_system_prompt_is_one_line(folder, system, message):
    system = system.replace("{folder}", str(folder))
    result = run(folder, *reward(folder), "--against-system", system)
    assert result.exit_code == 1
    assert message in result.stderr.splitlines()[-1]


def test_a_template_without_system_messages_is_refused(folder, tmp_path):
    base = leave_out_system_messages(make_checkpoint(tmp_path / "base"))
    against = ("--against", str(base), "--against-system", "Be a cat.")
    result = run(folder, *reward(folder), *GREEDY, *against)
    assert result.exit_code == 1
    assert "its chat template leaves out system messages" in result.stderr.splitlines()[-1]
