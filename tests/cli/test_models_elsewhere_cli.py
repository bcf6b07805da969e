"""Judges, teachers and opponents at an address, behind the commands that take them."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from click.testing import CliRunner

from mlx_dpo.cli import cli
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.prompts import make_prompt
from mlx_dpo.io.notices import notify_once
from mlx_dpo.openai_client import client
from mlx_dpo.paths import tiny_chat
from mlx_dpo.saved_runs.respond import open_responder
from tests.checkpoints import make_checkpoint
from tests.openai_client.fake_server import completion, fake_server
from tests.served import served

RUBRIC = "{prompt}<1>{first}<2>{second}<3>"
COUNT = 20  # prompts: a whole chunk of 16, and a part of one
BUSY, GARBAGE, DEAD = (429, {"Retry-After": "0"}, b""), b"<html>", None
PROGRAM = [sys.executable, "-c", "from mlx_dpo.cli import main; main()"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("elsewhere") / "base"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_DPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(client, "FIRST_DELAY", 0.001)
    notify_once.cache_clear()
    (tmp_path / "prompts.txt").write_text("".join(f"What is {n}?\n" for n in range(COUNT)))
    (tmp_path / "rubric.txt").write_text(RUBRIC)
    return tmp_path


def longer(body):
    """Judge by length: in both orders, the longer answer is better."""
    text = body["messages"][0]["content"]
    first, second = re.fullmatch(r"(?s).*<1>(.*)<2>(.*)<3>", text).groups()
    difference = len(first) - len(second)
    return completion("Hm. [[%s]]" % ("A" if difference > 0 else "B" if difference else "C"))


def collect(folder, model, *flags, output="pairs.jsonl"):
    given = ["--model", model, "--prompts", f"{folder}/prompts.txt", "-o", f"{folder}/{output}"]
    return CliRunner().invoke(cli, ["collect", *given, "--max-tokens", "6", *map(str, flags)])


def by_judge(folder, server, *more):
    return ["--judge", server.url, "--rubric", f"{folder}/rubric.txt", *more]


def rows(folder, name="pairs"):
    """Return the rows of both files without what differs from one address and time to another."""
    found = []
    for path in (folder / f"{name}.jsonl", folder / f"{name}.passed.jsonl"):
        for line in path.read_text().splitlines() if path.exists() else ():
            row = json.loads(line)
            for field in ("time", "by"):
                row["provenance"].pop(field)
            found.append(row)
    return found


def counts_line(result):
    [line] = [line for line in result.stderr.splitlines() if line.startswith("Replies of ")]
    return re.sub(r" \([\d.]+ \w+ sent\)", "", line.removeprefix("Replies of addresses: "))


@pytest.fixture
def undisturbed(folder, model):
    """Return the rows that a judge without any fault makes."""
    with fake_server(longer) as server:
        result = collect(folder, model, *by_judge(folder, server), output="whole.jsonl")
    assert result.exit_code == 0, result.output
    whole = rows(folder, "whole")
    judged = [row for row in whole if "points" in row["provenance"]]
    assert len(whole) == COUNT and len(judged) > 15
    assert counts_line(result) == f"{2 * len(judged)} from {2 * len(judged)} requests"
    for row in whole:
        if "chosen" in row:
            assert len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"])
    return whole, 2 * len(judged)


def test_a_judge_that_is_busy_slow_dead_or_mad_for_a_while_loses_nothing(
    folder, model, undisturbed
):
    whole, questions = undisturbed
    release = threading.Event()

    def slow(body):
        release.wait(20)
        return longer(body)

    script = [BUSY, longer, slow, GARBAGE, longer, DEAD, {"choices": []}, (503, {}, b"")]
    with fake_server(longer, script=script) as server:
        flags = by_judge(folder, server, "--max-concurrency", 1, "--request-timeout", 0.5)
        result = collect(folder, model, *flags)
        release.set()
    assert (result.exit_code, rows(folder)) == (0, whole), result.output
    assert counts_line(result) == (
        f"{questions} from {questions + 6} requests, 6 requests repeated"
    )


@pytest.mark.parametrize("answered", [0, 5, 33])  # before the first, in both chunks
def test_a_judge_that_dies_loses_nothing_and_the_same_command_resumes(
    folder, model, undisturbed, answered
):
    whole, questions = undisturbed
    with fake_server(DEAD, script=[longer] * answered) as server:
        flags = by_judge(folder, server, "--max-concurrency", 1)
        result = collect(folder, model, *flags)
    assert result.exit_code == 1
    error = result.stderr.splitlines()[-1]
    assert error.startswith(f"Error: {server.url}#m: no answer (") and "(5 attempts)" in error
    assert ("what it has answered is stored" in error) == (answered > 0)
    assert "Traceback" not in result.output
    # Whole chunks have their decisions, and the replies of the rest are stored.
    assert len(rows(folder)) == (16 if answered == 33 else 0)
    assert counts_line(result) == f"{answered} from {answered + 5} requests, 4 requests repeated"
    # The server is started again at its address.
    with fake_server(longer, port=server.port) as server:
        result = collect(folder, model, *flags)
    assert (result.exit_code, rows(folder)) == (0, whole), result.output
    assert len(server.bodies) == questions - answered


@pytest.mark.slow  # starts the program; `tests/openai_client/test_client.py` interrupts the client
def test_ctrl_c_loses_nothing(folder, model, undisturbed):
    whole, questions = undisturbed
    hanging, release = threading.Event(), threading.Event()

    def hang(body):
        hanging.set()
        release.wait(60)

    with fake_server(hang, script=[longer] * 9) as server:
        flags = ["--model", model, "--prompts", "prompts.txt", "-o", "pairs.jsonl"]
        command = [*PROGRAM, "collect", *flags, "--max-tokens", "6", *by_judge(folder, server)]
        with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
            assert hanging.wait(120)
            while server.at_once < 4:  # the last answered request is read
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGINT)
            errors = process.stderr.read()
            assert process.wait(60) == 130, errors
        assert "Interrupted; run the same command to resume" in errors
        assert "9 from 13 requests" in errors and "Traceback" not in errors
        release.set()
        server.answer = longer
        result = collect(folder, model, *by_judge(folder, server))
    assert (result.exit_code, rows(folder)) == (0, whole), result.output
    assert len(server.bodies) == 13 + questions - 9


def test_verdicts_that_never_come_are_counted_as_prompts_without_a_pair(folder, model):
    """Of each kind of fault there are as many skipped prompts as the server made faults."""

    def judge(body):
        number = int(re.search(r"What is (\d+)\?", body["messages"][0]["content"])[1])
        if number in (1, 3):
            return GARBAGE
        if number == 5:
            return completion("I cannot say.")
        if number == 7:
            return completion("<think>[[A]]</think> Both are")
        if number == 9:
            return completion(None, "length", reasoning_content="[[A]]")
        return completion("[[A]]") if number == 11 else longer(body)

    with fake_server(judge) as server:
        result = collect(folder, model, *by_judge(folder, server, "--max-concurrency", 1))
    assert result.exit_code == 0, result.output
    passed = [row["passed"] for row in rows(folder) if "passed" in row]
    assert passed.count("the judge gave no verdict") == 5
    assert passed.count("the two orders disagree") == 1
    assert "the judge gave no verdict: 5" in result.stdout
    # Two prompts, each in two orders, each five times.
    assert "16 requests repeated, 2 cut at the token limit, 4 not usable" in counts_line(result)


def test_an_address_of_another_machine_is_refused_before_anything_is_loaded(folder):
    result = collect(folder, "no/model", "--judge", "https://api.example.com/v1#m")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: https://api.example.com/v1#m: api.example.com is not this machine, and would get "
        "your prompts and answers; add --allow-remote to send them there\n"
    )
    result = collect(folder, "no/model", "--judge", "no/model", "--allow-remote")
    assert "`allow_remote` has no effect" in result.stderr


def test_the_answers_of_a_teacher_are_chosen_over_the_models_own(folder, model):
    def teach(body):
        number = body["messages"][-1]["content"].removeprefix("What is ")
        return completion(f"<think>Hm</think>\n\nIt is {number}")

    with fake_server(teach) as server:
        result = collect(folder, model, "--answers-from", server.url)
    assert result.exit_code == 0, result.output
    pairs = rows(folder)
    assert [row["chosen"][0]["content"] for row in pairs] == [f"It is {n}?" for n in range(COUNT)]
    own = {row["rejected"][0]["content"] for row in pairs}
    assert len(own) > 15 and not any("It is" in text for text in own)
    assert counts_line(result) == f"{COUNT} from {COUNT} requests"
    row = json.loads((folder / "pairs.jsonl").read_text().splitlines()[0])
    source = row["provenance"]
    assert (source["by"], source["chosen_from"]["model"]) == ("teacher", f"{server.url}#m")
    assert source["rejected_from"]["model"] == model


def test_pairs_whose_teacher_is_not_better_are_dropped_and_counted(folder, model):
    def teach(body):
        number = int(body["messages"][-1]["content"][8:-1])
        return completion("" if number == 0 else "x" if number < 4 else "much longer " * 9)

    with fake_server(teach) as server, fake_server(longer) as other:
        flags = ["--answers-from", server.url, *by_judge(folder, other)]
        result = collect(folder, model, *flags)
    assert result.exit_code == 0, result.output
    assert f"{COUNT - 4} pairs; no pair for 4 prompts" in result.stdout
    assert "the teacher's answer is worse than the model's own answer: 3" in result.stdout
    assert "the teacher's answer is empty: 1" in result.stdout


def test_a_teacher_that_dies_loses_nothing(folder, model):
    def teach(body):
        return completion("It is " + body["messages"][-1]["content"])

    with fake_server(teach) as server:
        assert collect(folder, model, "--answers-from", server.url, output="a.jsonl").exit_code == 0
    with fake_server(DEAD, script=[teach] * 18) as server:
        flags = ["--answers-from", server.url, "--max-concurrency", 1]
        result = collect(folder, model, *flags)
        assert result.exit_code == 1 and "16 pairs" in result.stdout, result.output
        server.answer = teach
        result = collect(folder, model, *flags)
    assert result.exit_code == 0 and "16 of 20 prompts already have" in result.stderr
    assert len(server.bodies) == 18 + 5 + 2
    strip = re.compile(r'"model": "http[^"]*"')
    texts = [strip.sub("", json.dumps(rows(folder, name))) for name in ("pairs", "a")]
    assert texts[0] == texts[1]


def test_a_teacher_may_be_a_model_on_this_machine(folder, model, tmp_path_factory):
    teacher = str(make_checkpoint(tmp_path_factory.mktemp("teacher"), seed=5))
    result = collect(folder, model, "--answers-from", teacher)
    assert result.exit_code == 0, result.output
    sources = [row["provenance"]["chosen_from"]["model"] for row in rows(folder) if "chosen" in row]
    assert set(sources) == {teacher} and len(sources) > 15


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--principles", "default"], "`answers_from` has no effect with --principles"),
        (["--system-chosen", "Be kind"], "`answers_from` has no effect with --system-chosen"),
        (["--answers", "4"], "`answers` has no effect with --answers-from"),
        (["--web"], "`web` has no effect with --answers-from"),
    ],
)
def test_flags_without_effect_for_a_teacher_are_refused(folder, model, flags, message):
    result = collect(folder, model, "--answers-from", model, *flags)
    assert result.exit_code == 1 and message in result.stderr


def test_the_answers_of_a_real_server_are_those_of_its_model(folder, model):
    """Greedy answers over `mlx-dpo serve` equal greedy answers of the same model here."""
    teacher, texts = str(tiny_chat()), [f"What is {n} + 3?" for n in range(COUNT)]
    (folder / "prompts.txt").write_text("\n".join(texts))
    sampling = Sampling(max_tokens=6)
    replies = open_responder(None, model=teacher).reply([*map(make_prompt, texts)], sampling)
    # MLX would compile kernels for new settings, which takes seconds on a CPU.
    with served("--model", teacher, MLX_DISABLE_COMPILE="1") as address:
        flags = ["--answers-from", address, "--temperature", "0"]
        first = collect(folder, model, *flags)
        again = collect(folder, model, *flags, output="again.jsonl")
    assert first.exit_code == again.exit_code == 0, first.output + again.output
    chosen = [
        (row["chosen"][0]["content"], "cut" in row["provenance"]["chosen_from"])
        for row in rows(folder)
    ]
    assert chosen == [(reply.text, reply.is_truncated) for reply in replies]
    cut = sum(reply.is_truncated for reply in replies)
    assert cut > 0 and len({reply.text for reply in replies}) > 5
    assert counts_line(first) == f"{COUNT} from {COUNT} requests, {cut} cut at the token limit"
    assert counts_line(again) == f"{COUNT} from the cache, {cut} cut at the token limit"
    assert rows(folder, "again") == rows(folder)
    assert len(rows(folder)[0]["provenance"]["chosen_from"]["model_digest"]) == 64


@pytest.fixture(scope="module")
def run_folder(model, tmp_path_factory):
    """Return the folder of a run on the model, with held-out prompts."""
    folder = tmp_path_factory.mktemp("run")
    pairs = [
        {"prompt": f"What is {n}?", "chosen": "the house on the hill is there", "rejected": "no"}
        for n in range(20)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    command = ["train", str(folder / "pairs.jsonl"), "--model", model, "--valid-fraction", "0.25"]
    command += ["--output", str(folder / "run"), "--learning-rate", "0.05", "--batch-size", "4"]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.output
    return str(folder / "run")


def winrate(run_folder, *flags):
    sampling = ["--max-tokens", "8", "--temperature", "0", "--json"]
    return CliRunner().invoke(cli, ["winrate", run_folder, *sampling, *map(str, flags)])


def test_an_opponent_and_a_judge_at_addresses_give_the_win_rate(folder, run_folder):
    with fake_server(lambda body: completion("x")) as opponent, fake_server(longer) as server:
        flags = [*by_judge(folder, server), "--against", opponent.url]
        result = winrate(run_folder, *flags)
        assert result.exit_code == 0, result.output
        figures = json.loads(result.stdout)
        assert (figures["wins"], figures["ties"], figures["losses"]) == (5, 0, 0)
        assert figures["by"] == f"judge {server.url}#m"
        # Five held-out prompts: one answer each, and two verdicts.
        assert counts_line(result) == "15 from 15 requests"
        again = winrate(run_folder, *flags)
    assert json.loads(again.stdout) == figures
    assert counts_line(again) == "15 from the cache"


def test_the_reference_at_an_address_gives_the_same_win_rate_as_here(folder, run_folder, model):
    (folder / "reward.py").write_text("def length(prompt, answer):\n    return len(answer)\n")
    reward = ["--reward", f"{folder}/reward.py:length"]
    here = json.loads(winrate(run_folder, *reward).stdout)
    replies = {}
    prompts = [make_prompt(f"What is {n}?") for n in range(20)]
    sampling = Sampling(max_tokens=8)
    for prompt, reply in zip(
        prompts, open_responder(None, model=model).reply(prompts, sampling), strict=True
    ):
        replies[prompt.messages[0]["content"]] = reply.text
    with fake_server(lambda body: completion(replies[body["messages"][0]["content"]])) as server:
        there = json.loads(winrate(run_folder, *reward, "--against", server.url).stdout)
    assert there == here | {"against": server.url}


def test_an_opponent_that_is_not_there_is_an_error_before_any_answer(folder, run_folder):
    with fake_server() as server:
        pass
    result = winrate(run_folder, "--reward", "statistics:mean", "--against", server.url)
    assert result.exit_code == 1 and "start the server, or fix the address" in result.stderr


def loop(folder, model, *flags):
    given = [f"{folder}/prompts.txt", "--model", model, "--output", f"{folder}/loop"]
    more = ["--rounds", 1, "--answers", 2, "--max-tokens", 6, "--prompts-per-round", 8]
    more += ["--epochs", 1, "--batch-size", 4, "--learning-rate", 0.01, *flags]
    return CliRunner().invoke(cli, ["loop", *map(str, [*given, *more])])


def test_a_loop_resumes_when_its_judge_is_back_and_stores_no_key(folder, model, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    with fake_server(DEAD, script=[longer] * 7) as server:
        flags = by_judge(folder, server, "--max-concurrency", 1, "--api-key-env", "JUDGE_KEY")
        result = loop(folder, model, *flags)
        assert result.exit_code == 1
        assert "what it has answered is stored" in result.stderr.splitlines()[-1]
        server.answer = longer
        again = CliRunner().invoke(cli, ["loop", "--resume", "--output", f"{folder}/loop"])
        assert again.exit_code == 0, again.output
        keys = {headers.get("Authorization") for headers in server.headers_seen}
    assert keys == {"Bearer sk-secret"}
    assert counts_line(result) == "7 from 12 requests, 4 requests repeated"
    # Two prompts are held out; base and last round are the same, and are judged once.
    judged = sum("points" in row["provenance"] for row in rows(folder, "loop/round-01/pairs"))
    assert judged > 5 and len(server.bodies) == 12 + 2 * judged - 7 + 4
    record = json.loads((folder / "loop" / "loop.json").read_text())["loop"]
    assert (record["judge"], record["api_key_env"]) == (server.url, "JUDGE_KEY")
    assert (record["allow_remote"], record["max_concurrency"]) == (False, 1)
    for path in folder.rglob("*"):
        assert not path.is_file() or b"sk-secret" not in path.read_bytes(), path
