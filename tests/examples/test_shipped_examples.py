"""The example pairs, prompts and rewards do something on the model that ships."""

import json
import runpy
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_dpo.cli import cli
from mlx_dpo.paths import PACKAGE, example_pairs, tiny_chat

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPTS = (EXAMPLES / "prompts.txt").read_text(encoding="utf-8").splitlines()
REWARD = ("--reward", f"{EXAMPLES}/rewards.py:courtesy")


def run(*words):
    result = CliRunner().invoke(cli, list(map(str, words)))
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    """The first prompts of the file, as tests have seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_DPO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[::5]) + "\n")
    return "prompts.txt"


def test_the_ten_example_pairs_have_no_faults_and_differ_in_prompt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = run("data", "example").stdout
    assert (
        "Check them: mlx-dpo data check new/pairs.jsonl"
        in run("data", "example", "--output", "new/pairs.jsonl").stdout
    )
    assert (tmp_path / "new" / "pairs.jsonl").read_text() == shown
    rows = [json.loads(line) for line in shown.splitlines()]
    assert len({row["prompt"] for row in rows}) == 10
    found = json.loads(
        run("data", "check", "new/pairs.jsonl", "--model", tiny_chat(), "--json").stdout
    )
    assert found["errors"] == 0
    assert found["train"]["pairs"] == 10


def test_the_demos_pairs_are_written_as_a_folder_with_its_held_out_pairs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("data", "example", "--all", "--output", "pairs")
    assert "pairs: 1,000 pairs to train on, 200 held out" in result.stdout
    assert "mlx-dpo train pairs --model " in result.stdout
    for name in ("train.jsonl", "valid.jsonl"):
        shipped = tiny_chat() / "preferences" / name
        assert (tmp_path / "pairs" / name).read_bytes() == shipped.read_bytes()


@pytest.mark.parametrize("words", [(), ("--all",)])
def test_example_pairs_replace_nothing(words, tmp_path):
    (tmp_path / "mine").write_text("x")
    result = CliRunner().invoke(
        cli, ["data", "example", *words, "--output", str(tmp_path / "mine")]
    )
    assert result.exit_code == 1
    assert f"{tmp_path}/mine" in result.stderr
    assert (tmp_path / "mine").read_text() == "x"


def test_an_installed_package_has_its_example_pairs_inside(tmp_path, monkeypatch):
    inside = tmp_path / "shipped" / "examples" / "pairs.jsonl"
    inside.parent.mkdir(parents=True)
    inside.write_text("{}\n")
    assert example_pairs().parent == PACKAGE.parent / "examples"
    monkeypatch.setattr("mlx_dpo.paths.PACKAGE", tmp_path)
    assert example_pairs() == inside


def test_rewards_are_higher_for_politer_and_for_shorter_answers():
    found = runpy.run_path(str(EXAMPLES / "rewards.py"))
    polite = ["7. Whatever.", "Of course! It is 7.", "Gladly! It is 7. I hope that helps!"]
    assert [found["courtesy"]([], answer) for answer in polite] == [0.0, 1.0, 2.0]
    assert found["courtesy"]([], " ".join(["Gladly, certainly, of course!"] * 9)) == 2.0
    short = ["", "It is 7.", "7."]
    assert sorted(short, key=lambda answer: found["brevity"]([], answer)) == short


def test_prompts_are_different_from_each_other():
    assert len(PROMPTS) == len(set(PROMPTS)) == 110
    assert all(line.strip() == line != "" for line in PROMPTS)


def test_the_reward_makes_pairs_of_the_shipped_models_answers(prompts):
    flags = ("--prompts", prompts, "--output", "pairs.jsonl", "--max-tokens", "48")
    result = run("collect", "--model", tiny_chat(), *flags, *REWARD)
    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    assert len(rows) >= 8
    for row in rows:
        points = row["provenance"]["points"]
        assert max(points) > min(points)
    assert f"pairs.jsonl: {len(rows)} pairs; no pair for " in result.stdout
    assert "the reward gave all answers to each of " in result.stderr


def test_a_round_of_the_loop_and_a_win_rate_are_not_trivial(prompts):
    """The commands of the README, with fewer prompts and steps."""
    model = ("--model", tiny_chat())
    settings = ("--epochs", "6", "--learning-rate", "2e-3", "--rounds", "1")
    limits = ("--max-tokens", "32", "--micro-batch-size", "8", "--samples", "0")
    run("loop", prompts, *model, *REWARD, "--output", "loop", *settings, *limits)
    record = json.loads(Path("loop/round-01/evaluation.json").read_text())
    assert record["collected"]["pairs"] >= 12
    run_folder = "loop/round-01/run"
    flags = ("--max-tokens", "32", "--json")
    rate = json.loads(run("winrate", run_folder, prompts, *REWARD, *flags).stdout)
    assert rate["wins"] > rate["losses"]
    assert rate["mean_rewards"][0] > rate["mean_rewards"][1]
