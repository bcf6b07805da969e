"""`mlx-dpo winrate --person` at a terminal, through a pipe and over the page's HTTP."""

import json
import re
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from click.testing import CliRunner

from mlx_dpo.cli import cli
from mlx_dpo.collect.blind_comparison import ComparisonFiles, ComparisonTasks, open_answers
from mlx_dpo.collect.pairs_file import PairsFile
from mlx_dpo.collect.session import TIE, RankingSession
from mlx_dpo.evaluation.winrate import AnswersOfBoth
from mlx_dpo.io.checksums import read_checked_json
from tests.checkpoints import make_checkpoint
from tests.cli.terminal import TerminalSession

KEYS = r"q quit: "


@pytest.fixture
def command(workplace):
    (workplace / "prompts.txt").write_text("Where is the cat?\nWho sat?\nWhy?\n")
    make_checkpoint(workplace / "other", seed=1)  # whose answers differ from those of the run
    flags = ("--against", "other", "--person", "--decisions", "votes.jsonl", "--max-tokens", "6")
    return ("winrate", "run", "prompts.txt", *flags)


def run(command, *more, keys=""):
    return CliRunner().invoke(cli, [*command, *more], input=keys)


def stored_rows():
    return json.loads(Path("votes.answers.json").read_text())["rows"]


def test_one_key_at_a_terminal_is_one_vote(command):
    terminal = TerminalSession(*command, "--rater", "ann", NO_COLOR="1")
    try:
        text = terminal.until(KEYS)
        assert "3 left" in text and "user: Where is the cat?" in text
        assert "e edit" not in text
        terminal.type("1")
        terminal.until(KEYS)
        terminal.type("u")
        assert "3 left" in terminal.until(KEYS)
        terminal.type("2")
        assert "2 left" in terminal.until(KEYS)
        terminal.type("q")
        table = terminal.until("not decided yet.*\n")
        assert terminal.exit_code() == 0
    finally:
        terminal.close()
    assert re.search(r"first answer won +0\.0% of 1", table)
    assert re.search(r"not decided yet +2", table)
    assert "agreement" not in terminal.output


def test_a_second_rater_sees_the_same_answers_and_the_table_has_both(command):
    assert run(command, "--rater", "ann", keys="2\n").exit_code == 0
    first = stored_rows()
    # No model is loaded again: without its weights the base could not be.
    Path("base/model.safetensors").write_bytes(b"")
    done = run(command, "--rater", "ben", "--json", keys="1\nt\ns\n")
    assert done.exit_code == 0, done.output
    assert stored_rows() == first
    figures = json.loads(done.stdout)
    ann, ben = figures["raters"]
    assert (ann["rater"], ann["judged"], ann["undecided"]) == ("ann", 1, 2)
    assert (ben["rater"], ben["judged"], ben["ties"], ben["skipped"]) == ("ben", 2, 1, 1)
    assert (ann["first_shown_won"], ben["first_shown_won"]) == (0.0, 1.0)
    # Both chose by place; they agree if, and only if, the orders differ.
    rows = [json.loads(Path(f"votes.{name}.jsonl").read_text()) for name in ("ann", "ben")]
    same = rows[0]["chosen"] == rows[1]["chosen"]
    assert (figures["agreement"]["raw"], figures["agreement"]["counts"]) == (same, [1])
    table = run(command, "--rater", "ben").stdout
    assert re.search(r" ann +ben ", table)
    assert f"agreement on 1 prompt: {100 * same:.1f}%; Cohen's kappa" in table


def test_a_person_who_decides_by_a_reward_has_the_win_rate_of_that_reward(command):
    """The person is a second implementation of the reward `length`."""
    Path("reward.py").write_text("def length(prompt, answer):\n    return len(answer)\n")
    Path("prompts.txt").write_text("".join(f"What is {n}?\n" for n in range(20)))
    run(command, keys="q\n")
    content, _ = read_checked_json(Path("votes.answers.json"))
    answers = [(row["run"], row["opponent"]) for row in content["rows"]]
    settings = content["settings"]
    files = ComparisonFiles(Path("votes.jsonl"))
    stored = open_answers(files, settings, None, lambda: AnswersOfBoth([], [], []))
    session = RankingSession(ComparisonTasks(stored, PairsFile(files.own), None))
    while (task := session.current_task) is not None:
        first, second = (len(answer.text) for answer in task.answers)
        if first == second:
            session.skip(TIE)
        else:
            session.prefer(*((0, 1) if first > second else (1, 0)))
    [person] = json.loads(run(command, "--json").stdout)["raters"]
    flags = ("--against", "other", "--reward", "reward.py:length", "--max-tokens", "6", "--json")
    judged = CliRunner().invoke(cli, ["winrate", "run", "prompts.txt", *flags])
    reward = json.loads(judged.stdout)
    assert len({(len(a) > len(b)) - (len(a) < len(b)) for a, b in answers}) > 1
    for name in ("judged", "wins", "ties", "losses", "win_rate", "interval_95",
                 "length_controlled_win_rate"):  # fmt: skip
        assert person[name] == reward[name], name


def test_the_page_of_web_takes_votes(command):
    terminal = TerminalSession(*command, "--web", "--no-open", NO_COLOR="1")
    try:
        url = re.search(r"http://127\.0\.0\.1:\d+/\?token=\S+", terminal.until(r"token=\S+\n"))[0]
        address, token = url.split("/?token=")

        def call(path, **body):
            headers = {"X-Token": token, "Content-Type": "application/json"}
            data = json.dumps(body).encode() if body else None
            with urlopen(Request(address + path, data, headers), timeout=60) as reply:
                return json.load(reply)

        state = call("/state")
        assert len(state["answers"]) == 2 and state["can_edit"] is False
        state = call("/do", do="prefer", best=0, worst=1, version=state["version"])
        assert (state["left"], state["decided"]) == (2, 1)
        call("/do", do="quit", version=state["version"])
        table = terminal.until("not decided yet.*\n")
        assert terminal.exit_code() == 0
    finally:
        terminal.close()
    assert re.search(r"first answer won +100\.0% of 1", table)


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (("--rater", "ann"), "`rater` has no effect without --person"),
        (("--web",), "`web` has no effect without --person"),
        (("--person",), "missing --decisions"),
        (("--person", "--decisions", "v.jsonl", "--reward", "r.py:f"),
         "`reward` has no effect with --person"),
        (("--person", "--decisions", "v.jsonl", "--port", "1"),
         "`port` has no effect without --web"),
        (("--person", "--decisions", "v.txt"), "give a name that ends in `.jsonl`"),
        (("--person", "--decisions", "v.jsonl", "--rater", "a/b"), "`rater` must be a name"),
        (("--prompts", "-", "--person", "--decisions", "v.jsonl"), "`-` has no effect"),
    ],
)  # fmt: skip
def test_flags_without_effect_are_refused_before_a_model_is_loaded(workplace, flags, found):
    done = run(("winrate", "run"), *flags)
    assert done.exit_code == 1
    assert found in done.output
    assert not list(workplace.glob("v.*"))


def test_without_a_decision_there_is_no_rate_and_other_settings_are_refused(command):
    done = run(command, keys="q\n")
    assert done.exit_code == 1
    assert done.output.endswith("votes.jsonl: no decision yet; run the same command to judge\n")
    done = run(command, "--temperature", "0.2", keys="1\n")
    assert "generated with `temperature` 0.7, not 0.2" in done.output
    done = run(command, "--against", "base", keys="1\n")
    assert "generated with another opponent" in done.output
