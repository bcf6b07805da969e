import json

import mlx_lm
import pytest
from click.testing import CliRunner

from mlx_dpo.cli import cli
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.evaluation.winrate import wilson_interval
from mlx_dpo.generation.generate import generate_batch
from tests.checkpoints import make_checkpoint

REWARD = """\
def length(prompt, answer):
    return len(answer)


def even(prompt, answer):
    return 0
"""
GREEDY = ("--max-tokens", "8", "--temperature", "0")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, a run that has moved it, prompts and rewards."""
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


def run(place, *arguments):
    return CliRunner().invoke(cli, ["winrate", str(place / "run"), *arguments])


def reward(place, name="length"):
    return ("--reward", f"{place}/reward.py:{name}")


def answers(place, prompts, adapter=None):
    path = None if adapter is None else str(adapter)
    model, tokenizer = mlx_lm.load(str(place / "base"), adapter_path=path)
    asked = [[{"role": "user", "content": text}] for text in prompts]
    return generate_batch(model, tokenizer, asked, sampling=Sampling(max_tokens=8))


def test_base_and_aligned_are_compared_on_prompts_as_mlx_lm_answers_them(place):
    prompts = (place / "prompts.txt").read_text().splitlines()
    result = run(place, str(place / "prompts.txt"), *reward(place), *GREEDY, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    aligned, base = answers(place, prompts, place / "run"), answers(place, prompts)
    outcomes = [
        1.0 if len(a) > len(b) else 0.5 if len(a) == len(b) else 0.0
        for a, b in zip(aligned, base, strict=True)
    ]
    assert found["win_rate"] == pytest.approx(sum(outcomes) / 3)
    assert found["interval_95"] == pytest.approx(wilson_interval(sum(outcomes), 3))
    assert found["mean_rewards"] == pytest.approx(
        [sum(map(len, aligned)) / 3, sum(map(len, base)) / 3]
    )
    assert (found["prompts"], found["judged"]) == (3, 3)


def test_without_prompts_the_run_is_asked_what_it_held_out(place):
    result = run(place, *reward(place), *GREEDY, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["prompts"] == 5


def test_against_itself_a_run_ties_everywhere(place):
    against = ("--against", str(place / "run"))
    result = run(place, *reward(place), *GREEDY, *against, "--json")
    found = json.loads(result.stdout)
    assert (found["wins"], found["ties"], found["losses"]) == (0, 5, 0)
    assert found["length_controlled_win_rate"] is None
    assert found["against"] == str(place / "run")


def test_the_table_shows_ties_and_the_interval(place):
    result = run(place, *reward(place, "even"), *GREEDY)
    assert result.exit_code == 0, result.output
    assert "5 prompts, against what it started from" in result.stdout
    assert "0, 5, 0" in " ".join(result.stdout.split())
    assert "95 % interval (Wilson)" in result.stdout
    assert "50.0%" in result.stdout


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "who judges is missing; give --reward file.py:function or --judge MODEL"),
        (
            ["{place}/one.txt", "--judge", "{base}"],
            "the judge gave no verdict on any prompt (it said",
        ),
        (["--reward", "{f}:length", "--top-k", "3"], "`top_k` has no effect with `temperature` 0"),
        (["--reward", "{f}:length", "--against", "{place}/none"], "none"),
    ],
)
def test_what_cannot_be_judged_is_said_in_one_line(place, more, message):
    names = {"{base}": f"{place}/base", "{f}": f"{place}/reward.py", "{place}": str(place)}
    for name, value in names.items():
        more = [word.replace(name, value) for word in more]
    result = run(place, *GREEDY, *more)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr.splitlines()[-1]
