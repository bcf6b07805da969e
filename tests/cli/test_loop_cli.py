"""`mlx-dpo loop` (iterative DPO): its rounds, their files, resuming, and `kill -9` anywhere."""

import json
import random
import re
import subprocess
import sys
import time

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_dpo.cli import cli
from mlx_dpo.demo.rules import is_correct
from mlx_dpo.paths import tiny_chat
from mlx_dpo.saved_runs.open import open_run
from tests.checkpoints import make_adapter, make_checkpoint
from tests.run_settings import SAMPLE_TOKENS

SCRIPT = (  # answers sampled at evaluations are as short as in this process
    f"from mlx_dpo.training.monitor import samples; samples.SAMPLE_TOKENS = {SAMPLE_TOKENS}; "
    "from mlx_dpo.cli import main; main()"
)
PROGRAM = [sys.executable, "-c", SCRIPT, "loop"]
REWARD = """\
def vowels(prompt, answer):
    return sum(letter in "aeiou" for letter in answer)


def even(prompt, answer):
    return 1.0
"""
STAGES = [
    *("Base: answer the held-out prompts",),
    *(f"Round 1: {action}" for action in ("collect answers and judge them", "train on the pairs")),
    "Round 1: answer the held-out prompts",
    *(f"Round 2: {action}" for action in ("collect answers and judge them", "train on the pairs")),
    "Round 2: answer the held-out prompts",
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_DPO_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("loop") / "base"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "prompts.txt").write_text("".join(f"What is {n}?\n" for n in range(20)))
    (tmp_path / "reward.py").write_text(REWARD)
    return tmp_path


def arguments(folder, model, *more, output="loop"):
    return [
        str(folder / "prompts.txt"),
        *("--model", model, "--output", str(folder / output)),
        *("--reward", f"{folder}/reward.py:vowels", "--rounds", "2"),
        *("--answers", "2", "--max-tokens", "8", "--prompts-per-round", "12"),
        *("--learning-rate", "0.01", "--batch-size", "4", "--save-steps", "1", *more),
    ]


def run(*flags):
    return CliRunner().invoke(cli, ["loop", *flags])


def stages(result):
    wanted = ("Base: ", "Round ")
    return [line for line in result.stdout.splitlines() if line.startswith(wanted)]


def evaluation(folder, number):
    return json.loads((folder / f"round-{number:02d}" / "evaluation.json").read_text())


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def collected_prompts(folder, number):
    collected = []
    for name in ("pairs.jsonl", "pairs.passed.jsonl"):
        collected += rows(folder / f"round-{number:02d}" / name)
    return sorted(row["prompt"][0]["content"] for row in collected)


def check_html_page(loop, stdout):
    page = loop / "loop.html"
    assert str(page) in stdout
    names = re.findall("<summary>(.+)</summary>", page.read_text())
    assert names == ["Round 2", "Round 1", "Base"]


def test_two_rounds_from_prompts_alone(folder, model):
    result = run(*arguments(folder, model))
    assert result.exit_code == 0, result.output
    assert stages(result) == STAGES
    assert "18 prompts to collect with, 2 held out" in result.stdout
    loop = folder / "loop"
    assert f"chat {loop}/round-02/run" in result.stdout
    page = (loop / "results.md").read_text()
    assert page.splitlines()[4] not in result.stdout  # aligned text, not Markdown
    assert re.search(r"^round +base +1 +2$", result.stdout, re.MULTILINE)
    check_html_page(loop, result.stdout)
    assert [line.split("|")[1].strip() for line in page.splitlines()[6:9]] == ["base", "1", "2"]

    # Rounds use the prompts in turn, and no held-out prompt.
    held_out = {row["prompt"][0]["content"] for row in evaluation(loop, 0)["answers"]}
    assert (len(collected_prompts(loop, 1)), len(collected_prompts(loop, 2)), len(held_out)) == (
        12,
        12,
        2,
    )
    assert set(collected_prompts(loop, 1)) | set(collected_prompts(loop, 2)) | held_out == {
        f"What is {n}?" for n in range(20)
    }
    assert not (set(collected_prompts(loop, 1)) | set(collected_prompts(loop, 2))) & held_out

    # The policy of round 1 is the sampler, the initial policy and the reference of round 2.
    second = json.loads((loop / "round-02" / "run" / "run.json").read_text())
    assert second["settings"]["start_adapter"] == str(loop / "round-01" / "run")
    assert second["settings"]["reference_model"] is None
    row = rows(loop / "round-02" / "pairs.jsonl")[0]
    assert row["provenance"]["chosen_from"]["run"] == str(loop / "round-01" / "run")
    row = rows(loop / "round-01" / "pairs.jsonl")[0]
    assert "run" not in row["provenance"]["chosen_from"]

    # Rewards and win rates belong to the stored answers.
    for number in (0, 1, 2):
        figures = evaluation(loop, number)
        texts = [row["now"] for row in figures["answers"]]
        assert figures["mean_reward"] == sum(sum(c in "aeiou" for c in t) for t in texts) / 2
    before = [row["now"] for row in evaluation(loop, 1)["answers"]]
    assert [row["before"] for row in evaluation(loop, 2)["answers"]] == before
    base = [row["now"] for row in evaluation(loop, 0)["answers"]]
    assert [row["base"] for row in evaluation(loop, 2)["answers"]] == base


def test_a_loop_by_principles_trains_on_revisions(folder, model):
    (folder / "principles.txt").write_text("An answer is kind.\nAn answer is short.\n")
    flags = ["--principles", str(folder / "principles.txt"), "--revisions", "2", "--rounds", "1"]
    command = arguments(folder, model, *flags)
    place = command.index("--answers")
    del command[place : place + 2]
    result = run(*command)
    assert result.exit_code == 0, result.output
    loop = folder / "loop"
    pairs = rows(loop / "round-01" / "pairs.jsonl")
    assert evaluation(loop, 1)["collected"]["pairs"] == len(pairs) > 0
    for row in pairs:
        assert len(row["provenance"]["chosen_from"]["revisions"]) == 2
        first, second = row["provenance"]["points"]
        assert first > second
    assert "revisions by principles" in (loop / "loop.html").read_text()
    assert run("--resume", "--output", str(loop)).exit_code == 0
    (folder / "principles.txt").write_text("An answer is kind.\nAn answer is fair.\n")
    result = run("--resume", "--output", str(loop))
    assert "the principles changed since the loop began" in result.stderr
    result = run(*arguments(folder, model, *flags, output="other"))
    assert "Error: `answers` has no effect with --principles" in result.stderr


def test_a_round_ends_after_its_pages_are_written(folder, model):
    assert run(*arguments(folder, model, "--rounds", "1")).exit_code == 0
    loop = folder / "loop"
    end = (loop / "round-01" / "evaluation.json").stat().st_mtime_ns
    pages = [loop / "results.md", loop / "loop.html", loop / "round-01" / "results.md"]
    assert all(page.stat().st_mtime_ns < end for page in pages)


def test_a_system_message_is_used_in_sampling_and_training(folder, model):
    result = run(*arguments(folder, model, "--rounds", "1", "--system", "Be brief."))
    assert result.exit_code == 0, result.output
    assert stages(result) == STAGES[:4]
    system = {"role": "system", "content": "Be brief."}
    loop = folder / "loop"
    pairs = rows(loop / "round-01" / "pairs.jsonl")
    assert all(row["prompt"][0] == system for row in pairs)
    assert all(row["prompt"][0] == system for row in evaluation(loop, 1)["answers"])
    # `chat` with the policy uses the same system message.
    record = json.loads((loop / "round-01" / "run" / "run.json").read_text())
    assert record["settings"]["system"] == "Be brief."


def test_a_changed_start_adapter_is_reported_on_resume(folder, model):
    (folder / "start").mkdir()
    start = make_adapter(folder / "start", model)
    more = ("--rounds", "1", "--start-adapter", str(start))
    assert run(*arguments(folder, model, *more)).exit_code == 0
    weights = mx.load(str(start / "adapters.safetensors"))
    changed = {name: 2 * value for name, value in weights.items()}
    mx.save_safetensors(str(start / "adapters.safetensors"), changed)
    result = run("--resume", "--output", str(folder / "loop"))
    assert "the start adapter changed since the loop began" in result.stderr


def test_a_finished_loop_continues_only_with_more_rounds(folder, model):
    assert run(*arguments(folder, model, "--rounds", "1")).exit_code == 0
    again = run("--resume", "--output", str(folder / "loop"))
    assert again.exit_code == 0, again.output
    assert stages(again) == []
    more = run("--resume", "--output", str(folder / "loop"), "--rounds", "2")
    assert more.exit_code == 0, more.output
    assert stages(more) == STAGES[4:]


def test_the_base_can_be_the_reference_of_all_rounds(folder, model):
    result = run(*arguments(folder, model, "--reference", "base"))
    assert result.exit_code == 0, result.output
    second = json.loads((folder / "loop" / "round-02" / "run" / "run.json").read_text())
    assert second["settings"]["reference_model"] == model
    assert second["settings"]["start_adapter"] == str(folder / "loop" / "round-01" / "run")
    # The policy of round 1 differs from the base before the first step.
    first = rows(folder / "loop" / "round-02" / "run" / "metrics.jsonl")[0]
    assert abs(first["rewards/margins"]) > 1e-3


def test_later_rounds_inherit_the_lora_settings_of_the_first(folder, model):
    result = run(*arguments(folder, model, "--lora-r", "3", "--num-layers", "1"))
    assert result.exit_code == 0, result.output
    described = [
        json.loads((folder / "loop" / f"round-{n:02d}" / "run" / "adapter_config.json").read_text())
        for n in (1, 2)
    ]
    assert described[0]["lora_parameters"]["rank"] == 3
    assert described[0] == described[1]


def test_settings_and_inputs_may_not_change_on_resume(folder, model):
    assert run(*arguments(folder, model, "--rounds", "1")).exit_code == 0
    loop = ("--resume", "--output", str(folder / "loop"))
    for more, message in [
        ([], f"{folder}/loop: holds a loop; add --resume"),
        (["--resume", "--batch-size", "3"], "the loop began with batch_size = 4, not 3"),
        (["--resume", "--answers", "3"], "the loop began with answers = 2, not 3"),
        (["--resume", "--temperature", "0.5"], "the loop began with sampling = "),
    ]:
        result = run(*arguments(folder, model, "--rounds", "1", *more))
        assert (result.exit_code, message in result.stderr) == (1, True), result.output
    (folder / "reward.py").write_text(REWARD + "\n")
    assert "the judge changed since the loop began" in run(*loop).stderr
    (folder / "reward.py").write_text(REWARD)
    (folder / "prompts.txt").write_text("one\ntwo\nthree\n")
    assert "the prompts changed since the loop began" in run(*loop).stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--reward", "{f}/reward.py:even"],
            "no prompt has a better and a worse answer (the reward gave every answer the same "
            "score (1.0)); use another reward, more --answers or a higher --temperature",
        ),
        (["--judge", "m"], "`judge` has no effect with `reward`"),
        (["--answers", "1"], "`answers` must be at least 2, got 1"),
        (["--rounds", "0"], "`rounds` must be at least 1, got 0"),
        (["--temperature", "0"], "temperature"),
        (["--mix", "1"], "`mix` has no effect in a loop"),
        (
            ["--bits", "8", "--reference", "base"],
            "`bits` makes the initial policy differ from the base",
        ),
        (["--valid-prompts", "{f}/prompts.txt"], "every prompt is held out"),
        (["--output", "{f}"], "not empty and not the folder of a loop (found `prompts.txt`)"),
        (["--reference-model", "m", "--loss-type", "simpo"], "`reference_model` has no effect"),
    ],
)
def test_invalid_settings_give_a_one_line_error(folder, model, more, message):
    result = run(*arguments(folder, model), *(word.replace("{f}", str(folder)) for word in more))
    assert result.exit_code == 1, result.output
    assert message in result.stderr.splitlines()[-1]


def start(folder, model, *more):
    return subprocess.Popen(
        [*PROGRAM, *arguments(folder, model, "--resume", *more)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def state(loop):
    """Return the number of files and rows, which grows while the loop works."""
    files = [path for path in loop.rglob("*") if path.is_file()] if loop.is_dir() else []
    lines = sum(path.read_bytes().count(b"\n") for path in files if path.suffix == ".jsonl")
    return len(files) + lines


def kill_and_resume(folder, model, moments, *more):
    for kills, moment in enumerate([*moments, None]):
        process = start(folder, model, *more)
        if moment is not None:
            moment(process)
            process.kill()
        _, errors = process.communicate()
        if process.returncode == 0:
            return kills
        assert process.returncode == -9, errors
    raise AssertionError("the last start did not end")


def when(condition):
    def wait(process):
        while not condition() and process.poll() is None:
            time.sleep(0.002)

    return wait


def count_pairs(loop, number):
    path = loop / f"round-{number:02d}" / "pairs.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def assert_same(folder, rounds=2):
    uninterrupted, killed = folder / "uninterrupted", folder / "loop"
    for number in range(1, rounds + 1):
        pairs = [
            rows(loop / f"round-{number:02d}" / "pairs.jsonl") for loop in (uninterrupted, killed)
        ]
        for row in (*pairs[0], *pairs[1]):
            del row["provenance"]["time"]
            for source in ("chosen_from", "rejected_from"):
                row["provenance"][source].pop("run", None)  # the folders differ
        assert pairs[0] == pairs[1]
        weights = [
            mx.load(str(loop / f"round-{number:02d}" / "run" / "adapters.safetensors"))
            for loop in (uninterrupted, killed)
        ]
        assert all(mx.array_equal(value, weights[1][name]) for name, value in weights[0].items())
        assert evaluation(uninterrupted, number) == evaluation(killed, number)
    assert (uninterrupted / "results.md").read_text() == (killed / "results.md").read_text()
    assert not list(killed.rglob(".mlx-dpo-*"))


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_loop_killed_in_each_stage_resumes_to_the_same_result(folder, model):
    assert run(*arguments(folder, model, output="uninterrupted")).exit_code == 0
    loop = folder / "loop"
    moments = [
        when(lambda: (loop / "round-01" / "run" / "checkpoints" / "step-000001").exists()),
        when(lambda: count_pairs(loop, 2) >= 3),
    ]
    assert kill_and_resume(folder, model, moments) == 2
    assert_same(folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_loop_killed_at_random_moments_resumes_to_the_same_result(folder, model):
    assert run(*arguments(folder, model, output="uninterrupted")).exit_code == 0
    draw = random.Random(5)
    loop = folder / "loop"

    def soon(process):
        grown = state(loop) + draw.randint(0, 4)
        end = time.monotonic() + draw.uniform(2, 12)
        while state(loop) <= grown and process.poll() is None and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))

    assert kill_and_resume(folder, model, [soon] * 25) >= 8
    assert_same(folder)


@pytest.mark.slow
def test_each_of_three_rounds_on_the_shipped_model_raises_the_reward(tmp_path):
    """From prompts alone, without existing pairs or decisions of a person."""
    source, loop = tiny_chat(), tmp_path / "loop"
    result = run(
        *(str(source / "preferences"), "--model", str(source), "--output", str(loop)),
        *("--reward", "mlx_dpo.demo.rules:courtesy", "--prompts-per-round", "320"),
        *("--max-tokens", "64", "--learning-rate", "1e-3", "--beta", "1", "--epochs", "3"),
        *("--max-length", "128", "--scorer", "plain", "--micro-batch-size", "8", "--seed", "0"),
    )
    assert result.exit_code == 0, result.output
    rounds = [evaluation(loop, number) for number in range(4)]
    rewards = [found["mean_reward"] for found in rounds]
    assert rewards == sorted(set(rewards)), rewards
    assert rounds[3]["against_base"]["win_rate"] >= 0.9
    # The reward ignores content; correct answers must stay correct.
    expects = rows(source / "preferences" / "valid.jsonl")
    right = [
        sum(map(is_correct, (shown["now"] for shown in found["answers"]), expects))
        for found in rounds
    ]
    assert right[3] >= right[0] - 10, right
    assert open_run(str(loop / "round-03" / "run")).finished
