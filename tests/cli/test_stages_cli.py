import json
import os
import subprocess
import sys
import time

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_dpo.cli import cli
from mlx_dpo.runs.folder import RunPaths, read_record

PROGRAM = [sys.executable, "-c", "from mlx_dpo.cli import main; main()", "train"]


def run(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture
def words(trained, tmp_path):
    rows = tmp_path / "answers.jsonl"
    lines = [{"prompt": f"Where is {n}?", "completion": f"On the hat, {n}."} for n in range(12)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = ("--valid-fraction", "0.25", "--batch-size", "3", "--lora-r", "4", "--samples", "0")
    return [trained / "pairs.jsonl", "--model", trained / "base", "--sft-rows", rows, *more]


def settings(folder, stage):
    return read_record(RunPaths(folder / stage))["settings"]


def test_two_stages_are_trained_with_their_own_settings_and_opened_as_one(words, tmp_path):
    stages = ("--stages", "sft,dpo", "--sft-learning-rate", "2e-3", "--sft-epochs", "2")
    given = (*words, *stages, "--learning-rate", "1e-3", "--beta", "0.5", "--save-steps", "1")
    result = run("train", *given, "-o", tmp_path / "run")
    assert result.exit_code == 0, result.output
    first, second = (settings(tmp_path / "run", name) for name in ("sft", "dpo"))
    assert (first["learning_rate"], first["epochs"], first["loss_type"]) == (2e-3, 2, ["sft"])
    assert (second["learning_rate"], second["epochs"], second["beta"]) == (1e-3, None, 0.5)
    assert first["pairs"] == [str(tmp_path / "answers.jsonl")]
    titles = [line for line in result.stdout.splitlines() if line.startswith("Stage ")]
    assert titles == [
        f"Stage {number} of 2: {name}, in {tmp_path}/run/{name}"
        for number, name in ((1, "sft"), (2, "dpo"))
    ]
    evaluated = run("eval", tmp_path / "run", "--json")
    assert evaluated.exit_code == 0, evaluated.output
    assert "using the stage" not in evaluated.stderr  # the last of finished stages is expected
    same = json.loads(run("eval", tmp_path / "run" / "dpo", "--json").stdout)
    found = json.loads(evaluated.stdout)
    assert found["eval_rewards/margins"] == same["eval_rewards/margins"]
    again = run("train", "--resume", "-o", tmp_path / "run")
    assert again.exit_code == 1
    assert again.stderr.splitlines()[-1].startswith(f"Error: {tmp_path}/run: all stages are finis")


def test_held_out_prompts_that_the_first_stage_knows_are_counted(trained, tmp_path):
    """Lists have one best answer but several pairs, so the stages hold out other prompts."""
    ratings = [("It is {}.", 9), ("Maybe {}.", 5), ("no", 2)]
    lines = [
        {
            "prompt": f"Where is {n}?",
            "completions": [
                {"response": text.format(n), "overall_score": score} for text, score in ratings
            ],
        }
        for n in range(8)
    ]
    rows = tmp_path / "lists.jsonl"
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = ("--batch-size", "4", "--samples", "0", "--sft-max-steps", "1", "--max-steps", "1")
    given = ("train", rows, "--model", trained / "base", "--stages", "sft,dpo", *more)
    result = run(*given, "--ranked", "all", "-o", tmp_path / "lists")
    assert result.exit_code == 0, result.output
    known = "3 of 3 held-out pairs have a prompt that the stage `sft` was trained on"
    assert known in result.stderr
    result = run(*given, "-o", tmp_path / "best")  # one pair of each list: the same prompts
    assert result.exit_code == 0, result.output
    assert "was trained on" not in result.stderr


def test_a_yaml_file_has_the_stages_and_the_settings_of_the_first(words, trained, tmp_path):
    rows = tmp_path / "answers.jsonl"
    (tmp_path / "settings.yaml").write_text(
        f"model: {trained / 'base'}\npairs: {trained / 'pairs.jsonl'}\nmax_steps: 1\nsamples: 0\n"
        f"stages: [sft, ipo]\nsft:\n  pairs: {rows}\n  max_steps: 2\n  learning_rate: 3e-3\n"
    )
    given = ("--config", tmp_path / "settings.yaml", "-o", tmp_path / "run", "--sft-max-steps", "1")
    result = run("train", *given)
    assert result.exit_code == 0, result.output
    first, second = (settings(tmp_path / "run", name) for name in ("sft", "ipo"))
    assert (first["learning_rate"], first["max_steps"]) == (3e-3, 1)  # the flag overrides the file
    assert (second["loss_type"], second["max_steps"]) == (["ipo"], 1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "`--sft-rows` has no effect without --stages sft,dpo"),
        (["--stages", "dpo"], "`stages` must be sft,dpo or sft and another loss, such as sft,"),
        (["--stages", "sft,dpo", "--overwrite"], "`--overwrite` is not possible with --stages"),
        (["--stages", "sft,dpo", "--ranks", "2"], "`--stages` train in one process"),
        (["--stages", "sft,dpo", "--loss-type", "sft"], "`stages` end with a loss of preferences"),
        (["--stages", "sft,dpo", "--lora-r", "0"], "`lora_r` must be at least 1"),
    ],
)
def test_flags_that_contradict_stages_are_an_error_of_one_line(words, tmp_path, more, message):
    result = run("train", *words, "-o", tmp_path / "run", *more)
    assert result.exit_code in (1, 2)
    assert message in result.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("sft: {epochs: 1}", "`sft` has no effect without --stages sft,dpo"),
        ("stages: [sft, dpo]\nsft: {pairs: 5}", "stage `sft`: `pairs` names files and datasets"),
        ("stages: [sft, dpo]\nsft: 5", "`sft` must be settings of the stage `sft`, got 5"),
        ("stages: 5", "`stages` must be sft,dpo, got 5"),
    ],
)
def test_wrong_settings_of_stages_in_yaml_are_an_error_of_one_line(tmp_path, settings, message):
    (tmp_path / "c.yaml").write_text(f"model: m\npairs: p.jsonl\noutput: run\n{settings}\n")
    result = run("train", "--config", tmp_path / "c.yaml")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(f"Error: {message}")


def start(folder, *words):
    command = [*PROGRAM, *map(str, words), "-o", str(folder), "--resume"]
    environment = os.environ | {"MLX_DPO_CACHE": str(folder.parent / "cache")}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def kill_when(process, is_due):
    while process.poll() is None and not is_due():
        time.sleep(0.01)
    process.kill()
    process.communicate()
    return process.returncode


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_stages_killed_in_both_and_between_them_end_at_the_same_weights(words, tmp_path):
    more = ("--stages", "sft,dpo", "--sft-epochs", "8", "--epochs", "8", "--save-steps", "3")
    given = (*words, *more, "--sft-learning-rate", "2e-3", "--learning-rate", "1e-3")
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    process = start(straight, *given)
    _, errors = process.communicate()
    assert process.returncode == 0, errors

    def rows(stage):
        path = killed / stage / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    moments = (
        (killed / "stages.json").is_file,  # before the first stage
        lambda: rows("sft") >= 5,
        (killed / "dpo").is_dir,  # between the stages
        lambda: rows("dpo") >= 5,
    )
    for is_due in moments:
        assert kill_when(start(killed, *given), is_due) == -9
    process = start(killed)  # all settings are in the record
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    for stage in ("sft", "dpo"):
        first, second = (
            mx.load(str(f / stage / "adapters.safetensors")) for f in (straight, killed)
        )
        assert all(mx.array_equal(value, second[name]) for name, value in first.items())
        assert rows(stage) == len((straight / stage / "metrics.jsonl").read_text().splitlines())
    assert not list(killed.rglob(".mlx-dpo-*"))
