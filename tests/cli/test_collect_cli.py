"""`mlx-dpo collect` at a terminal, through a pipe, with a reward, and after `kill -9`."""

import json
import random
import re
import subprocess
import sys
import time
from urllib.request import Request, urlopen

import pytest
from click.testing import CliRunner

from mlx_dpo.cli import cli
from mlx_dpo.cli.collect.results import print_responder_notes
from mlx_dpo.collect.pairs_file import lock_pairs
from mlx_dpo.errors import DataError
from mlx_dpo.paths import tiny_chat
from tests.checkpoints import make_checkpoint
from tests.cli.terminal import TerminalSession

PROGRAM = [sys.executable, "-c", "from mlx_dpo.cli import main; main()", "collect"]
REWARD = """\
import time


def length(prompt, answer):
    time.sleep(0.02)
    return len(answer)


def even(prompt, answer):
    return 1.0


def broken(prompt, answer):
    return answer.score
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("collect") / "base"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "prompts.txt").write_text("".join(f"What is {n}?\n" for n in range(12)))
    (tmp_path / "one.txt").write_text("Where is the cat?\n")
    (tmp_path / "reward.py").write_text(REWARD)
    return tmp_path


def arguments(folder, model, *more):
    return [
        *("--model", model, "--prompts", str(folder / "prompts.txt")),
        *("--output", str(folder / "pairs.jsonl"), "--max-tokens", "6", *more),
    ]


def run(*flags, stdin=None):
    return CliRunner().invoke(cli, ["collect", *flags], input=stdin)


def rows(path):
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def decided_prompts(folder):
    """Return the prompts of both files, in the order of the decisions."""
    decisions = []
    for name in ("pairs.jsonl", "pairs.passed.jsonl"):
        if (folder / name).exists():
            decisions += rows(folder / name)
    decisions.sort(key=lambda row: row["provenance"]["number"])
    return [row["prompt"][0]["content"] for row in decisions]


KEYS = r"q quit: "


def shown_answers(text):
    """Return the answers of the last task on a terminal, by key."""
    task = text[text.rindex("user:") :]
    parts = re.split(r"\n\[(\d)\](?: \(cut at the token limit\))?\n", task)
    return {key: part.strip() for key, part in zip(parts[1::2], parts[2::2], strict=True)}


def first_paragraph(text):
    return text.split("\n\n")[0].strip()


def test_at_a_terminal_one_key_is_one_decision(folder, model):
    editor = folder / "editor.sh"
    editor.write_text('#!/bin/sh\nprintf "edited by hand\\n" > "$1"\n')
    editor.chmod(0o755)
    terminal = TerminalSession(
        "collect", *arguments(folder, model), EDITOR=str(editor), NO_COLOR="1"
    )
    try:
        text = terminal.until(KEYS)
        assert "12 left" in text and "user: What is 0?" in text
        second = first_paragraph(shown_answers(text)["2"])
        terminal.type("2")
        assert "11 left" in terminal.until(KEYS)
        [row] = rows(folder / "pairs.jsonl")
        assert row["chosen"][0]["content"].strip() == second
        assert row["provenance"]["chosen_from"]["cut"] is True
        terminal.type("t")
        assert "10 left" in terminal.until(KEYS)
        terminal.type("u")
        assert "11 left" in terminal.until(KEYS)
        terminal.type("e")
        terminal.until("which answer do you want to edit")
        terminal.type("1")
        assert "10 left" in terminal.until(KEYS)
        assert rows(folder / "pairs.jsonl")[1]["chosen"][0]["content"] == "edited by hand"
        terminal.type("x")
        assert "Unknown key `x`" in terminal.until(KEYS)
        terminal.type("\x03")
        assert "2 pairs" in terminal.until("Train on them")
        assert terminal.exit_code() == 0
    finally:
        terminal.close()


def test_a_second_program_on_the_same_file_is_refused_before_it_loads_a_model(folder, model):
    flags = ("--reward", f"{folder / 'reward.py'}:length")
    with lock_pairs(folder / "pairs.jsonl"):
        result = run(*arguments(folder, model, *flags))
        assert result.exit_code == 1
        assert "pairs.jsonl: another program is writing decisions to it" in result.output
        assert "Loading" not in result.output
    assert not list(folder.glob("*pairs*"))
    assert run(*arguments(folder, model, *flags)).exit_code == 0
    assert not (folder / ".pairs.jsonl.lock").exists()


def test_a_folder_for_pairs_is_made_only_for_rows(tmp_path):
    path = tmp_path / "new" / "pairs.jsonl"
    with lock_pairs(path):
        pass
    assert not path.parent.exists()
    with lock_pairs(path):
        path.write_text("{}\n")
    assert [file.name for file in path.parent.iterdir()] == ["pairs.jsonl"]
    with pytest.raises(DataError, match=r"`\.jsonl`"), lock_pairs(tmp_path / "x" / "pairs.csv"):
        pass
    assert not (tmp_path / "x").exists()


def test_a_note_on_two_models_is_printed_once(capsys):
    class Noted:
        notes = ("old tokenizer",)

        def clip_note(self, prompts, max_tokens):
            return f"short context for {max_tokens}"

    print_responder_notes([Noted(), Noted()], [], 7)
    assert capsys.readouterr().err == "old tokenizer\nshort context for 7\n"


def test_prompts_are_typed_if_no_file_is_given(folder, model):
    command = ["collect", "--model", model, "--output", str(folder / "pairs.jsonl")]
    terminal = TerminalSession(*command, "--max-tokens", "6", NO_COLOR="1")
    try:
        for number in (1, 2):
            terminal.until("prompt> ")
            terminal.type("Where is the cat?\n")
            assert "user: Where is the cat?" in terminal.until(KEYS)
            terminal.type(str(number))
        terminal.until("prompt> ")
        for typed in ("\n", "  \n"):
            terminal.type(typed)
            terminal.until("The prompt is empty; type one, or press Ctrl-D to finish\nprompt> ")
        terminal.type("\x04")
        assert "2 pairs" in terminal.until("Train on them")
        assert terminal.exit_code() == 0
    finally:
        terminal.close()
    first, second = rows(folder / "pairs.jsonl")
    assert first["prompt"] == second["prompt"]
    answers = [
        {row[name][0]["content"] for name in ("chosen", "rejected")} for row in (first, second)
    ]
    assert answers[0] != answers[1]


def test_ctrl_c_at_a_typed_prompt_finishes_with_the_summary(folder, model):
    command = ["collect", "--model", model, "--output", str(folder / "pairs.jsonl")]
    terminal = TerminalSession(*command, "--max-tokens", "6", NO_COLOR="1")
    try:
        terminal.until("prompt> ")
        time.sleep(0.5)  # a signal between the prompt and the system call that reads would be lost
        terminal.type("\x03")
        output = terminal.until("0 pairs")
        assert "Traceback" not in output and "Aborted" not in output
        assert terminal.exit_code() == 0
    finally:
        terminal.close()


@pytest.mark.parametrize("lines", [b"\xff\n", b"Why?\n\xff\n"])
def test_bytes_that_are_no_text_end_a_pipe_with_a_one_line_error(folder, model, lines):
    flags = ("--model", model, "--output", str(folder / "pairs.jsonl"), "--max-tokens", "6")
    result = run(*flags, stdin=lines)
    assert result.exit_code == 1
    assert "not UTF-8; convert the text" in result.stderr.splitlines()[-1]


def trained(folder, model, name, *more):
    pairs = [{"prompt": f"Is it {n}?", "chosen": "It is.", "rejected": "no"} for n in range(4)]
    (folder / "train.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    flags = ["train", str(folder / "train.jsonl"), "--model", model, "--output", str(folder / name)]
    flags += ["--max-steps", "1", "--batch-size", "2", "--warmup-ratio", "0"]
    result = CliRunner().invoke(cli, [*flags, "--valid-fraction", "0", *more])
    assert result.exit_code == 0, result.output
    return str(folder / name)


def test_typed_prompts_get_the_system_message_of_the_run(folder, model, monkeypatch):
    monkeypatch.setenv("MLX_DPO_CACHE", str(folder / "cache"))
    kind = trained(folder, model, "kind", "--system", "Be kind.")
    flags = ("--output", str(folder / "pairs.jsonl"), "--max-tokens", "6")
    result = run(kind, *flags, stdin="Where is the cat?\n1\n")
    assert result.exit_code == 0, result.output
    [row] = rows(folder / "pairs.jsonl")
    assert row["prompt"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Where is the cat?"},
    ]
    # Runs with different system messages get the same one, and a note says so.
    plain = trained(folder, model, "plain")
    for first, second, note in (
        (kind, plain, "all of them get the system message Be kind."),
        (plain, kind, "all of them get no system message"),
    ):
        result = run(first, second, *flags, stdin="")
        assert f"RUNs differ in their system messages; {note}" in result.stderr
    assert "RUNs differ" not in run(kind, kind, *flags, stdin="").stderr


def test_through_a_pipe_each_line_is_a_key(folder, model):
    keys = "1\ne2 My own words.\ns\nu\n?\nt\n\nq\n"
    result = run(*arguments(folder, model), stdin=keys)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(
        f"{folder}/pairs.jsonl: 2 pairs; no pair for 1 prompt (tie: 1)\n"
    )
    # The other chosen answer was written by the person.
    assert "1 of the chosen answers was cut at the token limit" in result.stderr
    assert rows(folder / "pairs.jsonl")[1]["chosen"][0]["content"] == "My own words."
    again = run(*arguments(folder, model), stdin="1\n" * 20)
    assert "3 of 12 prompts already have a decision" in again.stderr
    assert "11 pairs; no pair for 1 prompt (tie: 1)" in again.stdout
    assert decided_prompts(folder) == [f"What is {n}?" for n in range(12)]


def test_of_three_answers_a_person_names_the_best_and_the_worst(folder, model):
    keys = "3 1\n3\n2\n1 1\n1 7\nq\n"
    result = run(*arguments(folder, model, "--answers", "3"), stdin=keys)
    assert result.exit_code == 0, result.output
    assert "2 pairs" in result.stdout
    assert "better than itself" in result.stderr and "No such answer" in result.stderr


def test_answers_come_from_several_temperatures_and_say_so(folder, model):
    more = ("--answers", "2", "--temperature", "0.3", "--temperature", "1.5")
    result = run(*arguments(folder, model, *more), stdin="1\n" * 12)
    assert result.exit_code == 0, result.output
    for row in rows(folder / "pairs.jsonl"):
        sources = [row["provenance"][f"{name}_from"] for name in ("chosen", "rejected")]
        assert sorted(source["sampling"]["temperature"] for source in sources) == [0.3, 1.5]
        assert row["provenance"]["chosen_from"]["model"] == model


def test_a_reward_decides_every_prompt_and_train_reads_the_file(folder, model):
    reward = ("--reward", f"{folder}/reward.py:length", "--answers", "3")
    result = run(*arguments(folder, model, *reward))
    assert result.exit_code == 0, result.output
    for row in rows(folder / "pairs.jsonl"):
        assert len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"])
        assert row["provenance"]["by"] == f"reward {folder}/reward.py:length"
        assert len(row["provenance"]["points"]) == 3
    command = ["train", str(folder / "pairs.jsonl"), "--model", model, "--output"]
    trained = CliRunner().invoke(
        cli, [*command, str(folder / "run"), "--bad-pairs", "error", "--batch-size", "4"]
    )
    assert trained.exit_code == 0, trained.output
    again = run(str(folder / "run"), "--output", str(folder / "next.jsonl"),
               "--prompts", str(folder / "prompts.txt"), "--max-tokens", "6", *reward)  # fmt: skip
    assert again.exit_code == 0, again.output
    source = rows(folder / "next.jsonl")[0]["provenance"]["chosen_from"]
    assert source["run"] == str(folder / "run")
    assert len(source["adapter_digest"]) == 64


def test_equal_rewards_make_no_pair(folder, model):
    result = run(*arguments(folder, model, "--reward", f"{folder}/reward.py:even"))
    assert result.exit_code == 0, result.output
    summary = f"{folder}/pairs.jsonl: 0 pairs; no pair for 12 prompts (tie: 12)"
    assert result.stdout.splitlines()[-1] == summary
    assert result.stderr.splitlines()[-1] == (
        "Warning: the reward gave every answer the same score (1.0); use another reward, more "
        "--answers or a higher --temperature"
    )


def test_prompts_with_equal_rewards_are_counted_beside_the_pairs(folder, model):
    (folder / "half.py").write_text(
        "def half(prompt, answer):\n"
        "    number = int(prompt[-1]['content'].split()[-1].strip('?'))\n"
        "    return sum(map(ord, answer)) if number >= 5 else number\n"
    )
    result = run(*arguments(folder, model, "--reward", f"{folder}/half.py:half"))
    assert result.exit_code == 0, result.output
    assert "pairs.jsonl: 7 pairs; no pair for 5 prompts (tie: 5)" in result.stdout
    note = "the reward gave all answers to each of 5 prompts the same score (0.0 to 4.0)"
    assert note in result.stderr.splitlines()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--reward", "{f}/reward.py:broken"], "{f}/reward.py:14: the reward failed (Attribute"),
        (["--answers", "1"], "`answers` must be at least 2, got 1"),
        (["--temperature", "0"], "`temperature` 0 gives the same answer each time"),
        (["--reward", "a.py:b", "--judge", "m"], "`judge` has no effect with `reward`"),
        (["--rubric", "r.txt"], "`rubric` has no effect without `judge`"),
        (["--port", "80"], "`port` has no effect without --web"),
        (["--no-open"], "`--no-open` has no effect without --web"),
        (["--web", "--judge", "m"], "`web` has no effect with --reward or --judge"),
        (["--prompts", "-"], "`-` has no effect: keys are read from stdin"),
        (["--prompts", "{f}/none.txt"], "{f}/none.txt: no such file"),
        (
            ["--judge", "{m}", "--prompts", "{f}/one.txt"],
            "{m}: the judge gave no verdict on any prompt (its reply was",
        ),
        (["--output", "{f}/pairs.json"], "pairs.json: rows are written as JSON lines"),
        (["{f}/no-run"], "name run folders or a --model, and only one of the two"),
    ],
)
def test_invalid_settings_give_a_one_line_error_and_write_nothing(folder, model, more, message):
    names = {"{f}": str(folder), "{m}": model}

    def fill(text):
        for name, value in names.items():
            text = text.replace(name, value)
        return text

    result = run(*arguments(folder, model), *map(fill, more))
    assert result.exit_code == 1, result.output
    assert fill(message) in result.stderr.splitlines()[-1]
    assert not list(folder.glob("pairs*"))


def test_the_default_rubric_can_be_printed():
    result = run("--print-rubric")
    assert result.exit_code == 0
    assert "{first}" in result.stdout and "[[A]]" in result.stdout


def start(folder, model, *more, stdin=None):
    return subprocess.Popen(
        [*PROGRAM, *arguments(folder, model, *more)],
        stdin=stdin,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def count_rows(folder):
    files = (folder / "pairs.jsonl", folder / "pairs.passed.jsonl")
    return sum(file.read_bytes().count(b"\n") for file in files if file.exists())


def without_time(folder):
    pairs = rows(folder / "pairs.jsonl")
    for row in pairs:
        del row["provenance"]["time"]
    return pairs


def kill_and_resume(folder, model, moments, *more):
    """Kill the program at each moment (number of rows, extra seconds); return the kills."""
    kills = 0
    for count, seconds in [*moments, (None, 0.0)]:
        process = start(folder, model, *more)
        while count is not None and count_rows(folder) < count and process.poll() is None:
            time.sleep(0.002)
        if count is not None:
            time.sleep(seconds)
            process.kill()
        _, errors = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -9, errors
        kills += 1
    return kills


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_killed_collection_resumes_to_the_same_rows(folder, model):
    more = ("--reward", f"{folder}/reward.py:length")
    (folder / "uninterrupted").mkdir()
    prompts = (folder / "prompts.txt").read_text()
    (folder / "uninterrupted" / "prompts.txt").write_text(prompts)
    result = run(*arguments(folder / "uninterrupted", model, *more))
    assert result.exit_code == 0, result.output
    assert kill_and_resume(folder, model, [(5, 0.003)], *more) == 1
    assert without_time(folder) == without_time(folder / "uninterrupted")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_collection_killed_at_random_moments_loses_and_repeats_no_prompt(folder, model):
    draw = random.Random(7)
    (folder / "prompts.txt").write_text("".join(f"What is {n}?\n" for n in range(160)))
    moments = [(round(n * 160 / 14), draw.uniform(0, 0.02)) for n in range(1, 14)]
    more = ("--reward", f"{folder}/reward.py:length")
    assert kill_and_resume(folder, model, moments, *more) >= 10
    assert sorted(decided_prompts(folder)) == sorted(f"What is {n}?" for n in range(160))


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_after_a_kill_every_confirmed_decision_of_a_person_is_in_the_file(folder, model):
    draw = random.Random(3)
    decided = 0
    for _ in range(2):
        process = start(folder, model, stdin=subprocess.PIPE)
        for key in draw.choices("12t", k=3):
            wait_for_task(process)
            process.stdin.write(f"{key}\n")
            process.stdin.flush()
            decided += 1
        wait_for_task(process)  # so the last decision was taken
        process.stdin.write("1\n")  # this decision may be lost
        process.stdin.flush()
        time.sleep(draw.uniform(0, 0.004))
        process.kill()
        process.communicate()
        written = len(decided_prompts(folder))
        assert written in (decided, decided + 1)
        decided = written
    assert decided_prompts(folder) == [f"What is {n}?" for n in range(decided)]


def wait_for_task(process):
    text = ""
    while not text.endswith("q quit: "):
        letter = process.stderr.read(1)
        assert letter, text
        text += letter


def test_with_web_the_program_takes_decisions_over_http(folder, model):
    process = start(folder, model, "--web", "--no-open")
    try:
        line = next(line for line in process.stderr if "http://" in line)
        address, token = re.search(r"(http://127\.0\.0\.1:\d+)/\?token=(\S+)", line).groups()

        def ask(path, body=None):
            headers = {"X-Token": token, "Content-Type": "application/json"}
            data = None if body is None else json.dumps(body).encode()
            with urlopen(Request(address + path, data, headers), timeout=60) as answer:
                return json.load(answer)

        state = ask("/state")
        assert (state["left"], state["prompt"][0]["content"]) == (12, "What is 0?")
        ask("/do", {"version": state["version"], "do": "prefer", "best": 1, "worst": 0})
        [row] = rows(folder / "pairs.jsonl")
        assert row["chosen"][0]["content"].strip() == state["answers"][1]
        ask("/do", {"do": "quit"})
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_training_on_pairs_of_a_scripted_person_reaches_an_accuracy_of_90_percent(tmp_path):
    from mlx_dpo.demo.rules import courteous_markers

    source = tiny_chat()
    output = tmp_path / "pairs.jsonl"
    prompts = tmp_path / "prompts.jsonl"
    lines = (source / "preferences" / "train.jsonl").read_text().splitlines()[:600]
    prompts.write_text("\n".join(lines) + "\n")
    flags = ("--model", str(source), "--prompts", str(prompts), "--output", str(output))
    terminal = TerminalSession("collect", *flags, "--max-tokens", "64", NO_COLOR="1")
    try:
        markers = courteous_markers(source)
        while "Train on them" not in (text := terminal.until(rf"{KEYS}|Train on them")):
            answers = shown_answers(text)
            first, second = (
                sum(marker in first_paragraph(answers[key]).lower() for marker in markers)
                for key in ("1", "2")
            )
            terminal.type("s" if first == second else "1" if first > second else "2")
        assert terminal.exit_code() == 0
    finally:
        terminal.close()
    run_folder = tmp_path / "run"
    command = ["train", str(output), "--model", str(source), "--output", str(run_folder)]
    command += ["--valid-fraction", "0.2", "--learning-rate", "1e-3", "--epochs", "3"]
    command += ["--beta", "0.5", "--max-length", "128", "--scorer", "plain"]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.output
    record = json.loads((run_folder / "run.json").read_text())
    assert record["evaluation"]["eval_rewards/accuracies"] >= 0.9
