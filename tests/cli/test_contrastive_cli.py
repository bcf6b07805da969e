"""`mlx-dpo collect` by principles and by system prompts, on a checkpoint with random weights."""

import json

import pytest
from click.testing import CliRunner

from mlx_dpo.cli import cli
from mlx_dpo.collect.principles.principle_set import default_principles
from tests.checkpoints import leave_out_system_messages, make_checkpoint

PRINCIPLES = "An answer is kind.\nAn answer is short.\n"
REWARD = "def vowels(prompt, answer):\n    return sum(letter in 'aeiou' for letter in answer)\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("contrastive") / "base"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "prompts.txt").write_text("".join(f"What is {n}?\n" for n in range(18)))
    (tmp_path / "principles.txt").write_text(PRINCIPLES)
    (tmp_path / "reward.py").write_text(REWARD)
    return tmp_path


def run(folder, model, *flags, output="pairs.jsonl"):
    given = ["--model", model, "--prompts", f"{folder}/prompts.txt", "-o", f"{folder}/{output}"]
    command = ["collect", *given, "--max-tokens", "6", *map(str, flags)]
    return CliRunner().invoke(cli, command)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def by_principles(folder, *more):
    return [
        "--principles",
        folder / "principles.txt",
        "--reward",
        f"{folder}/reward.py:vowels",
        *more,
    ]


def test_pairs_by_principles_are_trained_on(folder, model, monkeypatch):
    monkeypatch.setenv("MLX_DPO_CACHE", str(folder / "cache"))
    result = run(folder, model, *by_principles(folder, "--revisions", 2, "--critic", model))
    assert result.exit_code == 0, result.output
    pairs = rows(folder / "pairs.jsonl")
    skipped = rows(folder / "pairs.passed.jsonl")
    assert len(pairs) + len(skipped) == 18 and len(pairs) > 2
    assert f"{len(pairs)} pairs; no pair for {len(skipped)} prompts" in result.stdout
    for row in pairs:
        source = row["provenance"]["chosen_from"]
        assert {step["principle"] for step in source["revisions"]} <= set(PRINCIPLES.splitlines())
        assert source["critic"]["model"] == model
        first, second = row["provenance"]["points"]
        assert first > second
    train = ["train", str(folder / "pairs.jsonl"), "--model", model, "-o", str(folder / "run")]
    train += ["--max-steps", "1", "--batch-size", "2", "--warmup-ratio", "0"]
    result = CliRunner().invoke(cli, [*train, "--valid-fraction", "0"])
    assert result.exit_code == 0, result.output


def test_a_resumed_collection_has_the_same_pairs(folder, model):
    flags = by_principles(folder)
    assert run(folder, model, *flags).exit_code == 0
    whole = rows(folder / "pairs.jsonl")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in whole[:2]))
    (folder / "pairs.passed.jsonl").unlink()
    result = run(folder, model, *flags)
    assert "2 of 18 prompts already have a decision" in result.stderr
    again = rows(folder / "pairs.jsonl")
    for row in (*whole, *again):
        del row["provenance"]["time"], row["provenance"]["number"]
    assert again == whole
    assert run(folder, model, *flags).exit_code == 0  # nothing is left to do
    assert len(rows(folder / "pairs.jsonl")) == len(whole)


def test_pairs_by_system_prompts_are_stored_without_them(folder, model):
    (folder / "kind.txt").write_text("Be kind.\n")
    (folder / "rude.txt").write_text("Be rude.\n")
    flags = ("--system-chosen", f"@{folder}/kind.txt", "--system-rejected", f"@{folder}/rude.txt")
    result = run(folder, model, *flags)
    assert result.exit_code == 0, result.output
    assert "18 pairs\n" in result.stdout
    for row in rows(folder / "pairs.jsonl"):
        assert [turn["role"] for turn in row["prompt"]] == ["user"]
        assert row["provenance"]["chosen_from"]["system"] == "Be kind."
        assert row["provenance"]["rejected_from"]["system"] == "Be rude."
    reward = ("--reward", f"{folder}/reward.py:vowels")
    result = run(folder, model, *flags, *reward, output="judged.jsonl")
    reasons = {row["passed"] for row in rows(folder / "judged.passed.jsonl")}
    assert reasons <= {
        f"the answer with --system-chosen is {verdict} than the answer with --system-rejected"
        for verdict in ("worse", "no better")
    }
    assert 0 < len(rows(folder / "judged.jsonl")) < 18


def test_a_template_without_system_messages_is_refused(folder):
    """Both answers would be to the same prompt, and the better one a matter of chance."""
    model = leave_out_system_messages(make_checkpoint(folder / "base"))
    result = run(folder, str(model), "--system-chosen", "Be kind.")
    assert result.exit_code == 1
    assert "its chat template leaves out system messages, so `system_chosen`" in result.stderr
    assert rows(folder / "pairs.jsonl") == []


def test_the_model_is_its_own_judge_and_says_so(folder, model):
    """Random weights give no verdict, which ends the collection before a pair is written."""
    result = run(folder, model, "--principles", "default")
    assert f"Judge: {model}, which judges its own answers by the principles" in result.stderr
    assert result.exit_code == 1
    assert "gave no verdict on any prompt" in result.stderr.splitlines()[-1]
    assert rows(folder / "pairs.jsonl") == []


def test_the_principles_are_printed():
    result = CliRunner().invoke(cli, ["collect", "--print-principles"])
    assert (result.exit_code, result.stdout) == (0, default_principles())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--revisions", 2), "`revisions` has no effect without --principles"),
        (("--revision-temperature", 1), "`revision_temperature` has no effect without --princ"),
        (("--critic", "m"), "`critic` has no effect without --principles"),
        (("--system-rejected", "x"), "`system_rejected` has no effect without --system-chosen"),
        (("--principles", "default", "--system-chosen", "x"), "`system_chosen` has no effect"),
        (("--principles", "default", "--web"), "`web` has no effect with --principles"),
        (("--principles", "default", "--answers", 2), "`answers` has no effect with --principles"),
        (("--system-chosen", "x", "--temperature", 1, "--temperature", 2), "takes one temperature"),
        (("--system-chosen", "x", "--rubric", "r"), "`rubric` has no effect without `judge`"),
        (("--system-chosen", ""), "`system_chosen` is empty; write a system prompt"),
        (("--system-chosen", "@/no/such"), "/no/such: no such file"),
        (("--system-chosen", "kind.md"), "`kind.md` is the name of a file; write `@kind.md`"),
        (("--system-chosen", "x", "--system-rejected", " "), "`system_rejected` is empty"),
        (("--principles", "/no/such"), "/no/such: no such file"),
        (("--principles", "default", "--revisions", 15), "`revisions` 15 needs 15 principles"),
    ],
)
def test_a_flag_without_effect_is_refused_before_a_model_is_loaded(folder, flags, message):
    result = run(folder, str(folder / "no model"), *flags)
    assert result.exit_code == 1
    [*_, line] = result.stderr.splitlines()
    assert line.startswith("Error: ") and message in line
    assert not (folder / "pairs.jsonl").exists()


def test_one_run_answers(folder):
    given = ["collect", "a", "b", "--prompts", str(folder / "prompts.txt"), "-o", "pairs.jsonl"]
    result = CliRunner().invoke(cli, [*given, "--principles", "default"])
    assert "Error: --principles takes one run, got 2; leave out the others" in result.stderr
    result = CliRunner().invoke(cli, ["collect", "a", "-o", "p.jsonl", "--principles", "default"])
    assert "Error: missing --prompts" in result.stderr
