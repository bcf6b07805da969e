"""Blind comparison by people: stored answers, orders, outcomes and files of several raters."""

import json
import threading
from dataclasses import asdict

import pytest

from mlx_dpo.collect.blind_comparison import (
    ComparisonFiles,
    ComparisonTasks,
    StoredAnswers,
    open_answers,
    read_raters,
)
from mlx_dpo.collect.pairs_file import PairsFile
from mlx_dpo.collect.session import SKIPPED, TIE, RankingSession
from mlx_dpo.collect.web import RankingServer, page_state, read_page, run_command, serve_session
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.prompts import make_prompt
from mlx_dpo.errors import ConfigError, DamagedFileError, DataError
from mlx_dpo.evaluation.rewards import LOSS, WIN
from mlx_dpo.evaluation.rewards import TIE as TIED
from mlx_dpo.evaluation.winrate import AnswersOfBoth
from tests.webdriver import CHROMIUM, DRIVER, browser

PROMPTS = [make_prompt(text, text) for text in ("first?", "second?", "third?", "same?", "empty?")]
OURS = ["ours 1", "ours 2, longer", "ours 3", "equal", ""]
THEIRS = ["theirs 1", "theirs 2", "theirs 3", "equal ", "theirs 5"]
SETTINGS = {
    "run": "digest",
    "opponent": None,
    "sampling": asdict(Sampling(temperature=0.7, seed=3)),
}
KEYS = {prompt.location: prompt.key for prompt in PROMPTS}


def answer():
    return AnswersOfBoth(PROMPTS, OURS, THEIRS)


def no_answer():
    raise AssertionError("the answers are stored; no model may be loaded")


@pytest.fixture
def votes(tmp_path):
    return tmp_path / "votes.jsonl"


def stored(votes, **settings):
    return open_answers(ComparisonFiles(votes), SETTINGS | settings, None, answer)


def session(votes, rater=None):
    files = ComparisonFiles(votes, rater)
    return RankingSession(ComparisonTasks(stored(votes), PairsFile(files.own), rater))


def authors(task):
    return [answer.source["author"] for answer in task.answers]


def choose(judging, author):
    """Prefer the answer of `author` to the current prompt; return the place where it was shown."""
    place = authors(judging.current_task).index(author)
    judging.prefer(place, 1 - place)
    return place


def test_a_second_rater_gets_the_stored_answers_without_a_model(votes):
    first = stored(votes)
    again = open_answers(ComparisonFiles(votes, "ben"), SETTINGS, PROMPTS[::-1], no_answer)
    assert again == first
    assert first.answers[KEYS["second?"]] == ("ours 2, longer", "theirs 2")
    # Nothing of the run is in what a rater sees.
    state = json.dumps(page_state(session(votes, "ben")))
    assert "opponent" not in state and '"run"' not in state


@pytest.mark.parametrize(
    ("settings", "prompts", "found"),
    [
        ({"run": "other"}, None, "another run; name the run of the first time"),
        ({"opponent": "base"}, None, "another opponent"),
        (
            {"sampling": asdict(Sampling(temperature=0.7, seed=4))},
            None,
            "`seed` 3, not 4; repeat the settings",
        ),
        ({}, PROMPTS[:4], "its answers are to other prompts"),
    ],
)
def test_stored_answers_of_other_settings_are_refused(votes, settings, prompts, found):
    stored(votes)
    with pytest.raises(ConfigError, match=found):
        open_answers(ComparisonFiles(votes), SETTINGS | settings, prompts, no_answer)


def test_a_folder_that_cannot_be_written_is_found_before_answers_are_generated(tmp_path):
    (tmp_path / "file").write_text("")
    files = ComparisonFiles(tmp_path / "file" / "votes.jsonl")
    with pytest.raises(ConfigError, match=r"votes\.answers\.json: cannot be written"):
        open_answers(files, SETTINGS, None, no_answer)


def test_changed_answers_are_refused(votes):
    stored(votes)
    path = votes.with_suffix(".answers.json")
    path.write_text(path.read_text().replace("ours 1", "ours 0"))
    with pytest.raises(DamagedFileError, match="does not match its checksum"):
        stored(votes)


def test_the_order_is_random_by_prompt_and_rater_and_the_same_again(tmp_path):
    prompts = [make_prompt(f"{n}?", str(n)) for n in range(200)]
    answers = StoredAnswers(prompts, {p.key: ("ours", "theirs") for p in prompts}, seed=0)

    def order(rater):
        tasks = ComparisonTasks(answers, PairsFile(tmp_path / f"{rater}.jsonl"), rater)
        return [authors(task)[0] for chunk in tasks.chunks() for task in chunk]

    ann, ben = order("ann"), order("ben")
    assert order("ann") == ann != ben
    # 200 fair throws are within 4 standard deviations of 100: 4 · 7.07 = 28.3.
    assert all(abs(one.count("run") - 100) < 28 for one in (ann, ben))
    same = sum(a == b for a, b in zip(ann, ben, strict=True))
    assert abs(same - 100) < 28


def test_outcomes_are_those_of_the_run_wherever_its_answer_was_shown(votes):
    judging = session(votes, "ann")
    places = [choose(judging, "run"), choose(judging, "opponent")]
    judging.skip(TIE)
    judging.skip(SKIPPED)
    [ann] = read_raters(ComparisonFiles(votes), stored(votes))
    assert ann.name == "ann"
    assert [(v.prompt, v.outcome, v.length_difference) for v in ann.votes] == [
        (KEYS["first?"], WIN, -2), (KEYS["second?"], LOSS, 6), (KEYS["third?"], TIED, -2),
    ]  # fmt: skip
    assert [v.first_won for v in ann.votes] == [places[0] == 0, places[1] == 0, None]
    # Equal texts tie without a vote; an empty answer is judged like any other.
    assert (ann.identical, ann.skipped, ann.undecided) == (1, 1, 0)
    assert (ann.rate.wins, ann.rate.ties, ann.rate.losses) == (1, 2, 1)


def test_a_stopped_rater_continues_and_undo_takes_a_vote_back(votes):
    judging = session(votes)
    choose(judging, "run")
    choose(judging, "run")
    assert judging.undo()
    again = session(votes)
    assert again.current_task.prompt.key == KEYS["second?"]
    assert again.tasks.remaining == 4
    [rater] = read_raters(ComparisonFiles(votes), stored(votes))
    assert (rater.name, len(rater.votes), rater.undecided) == ("(no name)", 1, 4)


def test_raters_have_files_of_their_own_which_can_be_trained_on(votes):
    for rater in (None, "ben", "ann"):
        choose(session(votes, rater), "run")
    names = sorted(path.name for path in votes.parent.iterdir())
    assert names == ["votes.ann.jsonl", "votes.answers.json", "votes.ben.jsonl", "votes.jsonl"]
    row = json.loads((votes.parent / "votes.ben.jsonl").read_text())
    assert row["chosen"] == [{"role": "assistant", "content": "ours 1"}]
    assert row["provenance"]["rater"] == "ben"
    raters = read_raters(ComparisonFiles(votes), stored(votes))
    assert [rater.name for rater in raters] == ["(no name)", "ann", "ben"]


@pytest.mark.parametrize("name", ["", "answers", "passed", "a.b", "../x", "-", "x" * 41])
def test_a_name_that_is_no_part_of_a_file_name_is_refused(votes, name):
    with pytest.raises(ConfigError, match="`rater` must be a name"):
        ComparisonFiles(votes, name)


def test_a_decision_on_other_answers_is_an_error(votes):
    choose(session(votes), "run")
    votes.write_text(votes.read_text().replace("ours 1", "ours 0"))
    with pytest.raises(DataError, match="decision 1 is about other answers"):
        read_raters(ComparisonFiles(votes), stored(votes))
    votes.write_text(votes.read_text().replace("first?", "other?"))
    with pytest.raises(DataError, match="decision 1 is about a prompt that has no stored answers"):
        read_raters(ComparisonFiles(votes), stored(votes))


def test_no_answer_can_be_written_by_hand(votes):
    judging = session(votes)
    state = page_state(judging)
    assert state["can_edit"] is False
    command = {"do": "edit", "rejected": 0, "text": "mine", "version": state["version"]}
    assert run_command(judging, command) == "answers cannot be edited here; choose the better one"
    assert not votes.exists()


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Chromium and its driver")
def test_in_a_browser_a_key_is_a_vote_and_there_is_no_editing(votes, tmp_path):
    judging, server = session(votes, "ann"), RankingServer(read_page())
    thread = threading.Thread(target=serve_session, args=(judging, server), daemon=True)
    thread.start()
    with browser(tmp_path / "profile") as page:
        page.open(server.url)
        page.script("return document.querySelectorAll('.answer').length")
        assert page.script("return document.getElementById('edit').hidden") is True
        page.press("1", "q")
    thread.join(10)
    [ann] = read_raters(ComparisonFiles(votes), stored(votes))
    assert [vote.first_won for vote in ann.votes] == [True]
