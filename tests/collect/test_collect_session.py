import json

import pytest

from mlx_dpo.collect.pairs_file import PairsFile
from mlx_dpo.collect.session import (
    EMPTY,
    IDENTICAL,
    SKIPPED,
    TIE,
    Answer,
    RankingSession,
    TaskSampler,
)
from mlx_dpo.data.prompts import make_prompt
from mlx_dpo.data.sources import read_rows
from mlx_dpo.errors import ConfigError, DataError

NAMES = [f"q{n}" for n in range(6)]


class Sampler:
    """Two answers that name their prompt, chunk and place; keeps what it was asked."""

    def __init__(self, *texts):
        self.texts = texts or ("yes", "no")
        self.asked = []

    def __call__(self, prompts, chunk):
        self.asked.append((chunk, [prompt.messages[0]["content"] for prompt in prompts]))
        return [
            [
                Answer(text and f"{text} {chunk} {prompt.messages[0]['content']}", {"place": n})
                for n, text in enumerate(self.texts)
            ]
            for prompt in prompts
        ]


def begin(path, sampler=None, names=NAMES, chunk=4, seed=0):
    prompts = [make_prompt(name) for name in names]
    return TaskSampler(prompts, PairsFile(path), sampler or Sampler(), chunk=chunk, seed=seed)


def rows(path):
    return [row.record for row in read_rows(path)] if path.exists() else []


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pairs.jsonl"


def name_of(session):
    return session.question.prompt.messages[0]["content"]


def test_a_pick_is_a_row_that_train_reads_with_where_it_came_from(path):
    session = RankingSession(begin(path))
    texts = [answer.text for answer in session.question.answers]
    session.prefer(1, 0)
    [row] = rows(path)
    assert row["prompt"] == [{"role": "user", "content": "q0"}]
    assert row["chosen"] == [{"role": "assistant", "content": texts[1]}]
    assert row["rejected"] == [{"role": "assistant", "content": texts[0]}]
    told = row["provenance"]
    assert (told["number"], told["by"]) == (1, "person")
    place = {"yes": 0, "no": 1}
    assert told["chosen_from"] == {"place": place[texts[1].split()[0]]}
    assert told["rejected_from"] == {"place": place[texts[0].split()[0]]}


def test_the_order_of_answers_tells_nothing_of_where_they_came_from(path):
    names = [f"q{n}" for n in range(200)]
    [questions] = begin(path, names=names, chunk=200).chunks()
    first = sum(question.answers[0].source["place"] for question in questions)
    assert 70 < first < 130
    [again] = begin(path, names=names, chunk=200).chunks()
    assert [q.answers for q in again] == [q.answers for q in questions]
    [other] = begin(path, names=names, chunk=200, seed=1).chunks()
    assert [q.answers for q in other] != [q.answers for q in questions]


def test_what_is_decided_is_not_asked_again_and_chunks_stay_where_they_were(path):
    session = RankingSession(begin(path))
    session.prefer(0, 1)
    session.pass_over(TIE)
    session.pass_over(SKIPPED)
    sampler = Sampler()
    again = RankingSession(begin(path, sampler))
    left = []
    while again.question:
        left.append(again.question)
        again.pass_over(SKIPPED)
    assert [question.prompt.messages[0]["content"] for question in left] == ["q3", "q4", "q5"]
    # The chunk that was begun is sampled whole, under its own number: the answers are the same.
    assert sampler.asked == [(0, NAMES[:4]), (1, NAMES[4:])]
    assert RankingSession(begin(path, Sampler())).question is None


def test_a_decided_chunk_is_not_sampled(path):
    session = RankingSession(begin(path, names=NAMES[:4]))
    for _ in range(4):
        session.prefer(0, 1)
    sampler = Sampler()
    assert name_of(RankingSession(begin(path, sampler))) == "q4"
    assert [chunk for chunk, _ in sampler.asked] == [1]


def test_a_tie_is_kept_with_its_answers_apart_from_the_pairs(path):
    session = RankingSession(begin(path))
    texts = [answer.text for answer in session.question.answers]
    session.pass_over(TIE)
    assert rows(path) == []
    [row] = rows(path.with_suffix(".passed.jsonl"))
    assert (row["passed"], row["answers"]) == ("tie", texts)


@pytest.mark.parametrize(
    ("texts", "why"),
    [(("same", "same"), IDENTICAL), (("", "one"), EMPTY), (("", ""), IDENTICAL)],
)
def test_answers_that_cannot_differ_are_never_shown(path, texts, why):
    sampler = Sampler(*texts)
    assert RankingSession(begin(path, sampler)).question is None
    passed = rows(path.with_suffix(".passed.jsonl"))
    assert [row["passed"] for row in passed] == [why] * 6
    assert [row["provenance"]["by"] for row in passed] == ["nobody"] * 6


def test_answers_that_differ_in_white_space_alone_are_alike(path):
    def spaced(prompts, chunk):
        return [[Answer("same", {}), Answer("same\n", {})] for _ in prompts]

    assert RankingSession(begin(path, spaced)).question is None
    assert {row["passed"] for row in rows(path.with_suffix(".passed.jsonl"))} == {IDENTICAL}


def test_of_several_answers_only_the_different_ones_are_shown(path):
    question = RankingSession(begin(path, Sampler("a", "b", "a", "", "b"))).question
    assert sorted(answer.source["place"] for answer in question.answers) == [0, 1]


def test_an_edited_answer_is_better_than_the_one_it_improves(path):
    session = RankingSession(begin(path))
    worse = session.question.answers[1]
    session.improve(1, "  mine\n")
    [row] = rows(path)
    assert row["chosen"] == [{"role": "assistant", "content": "mine"}]
    assert row["rejected"] == [{"role": "assistant", "content": worse.text}]
    assert row["provenance"]["edited"] is True
    assert row["provenance"]["rejected_from"] == worse.source
    assert "chosen_from" not in row["provenance"]


def test_an_edit_that_changes_nothing_decides_nothing(path):
    session = RankingSession(begin(path))
    for text in ("", "  \n", session.question.answers[0].text + " "):
        with pytest.raises(ConfigError, match="empty or unchanged"):
            session.improve(0, text)
    with pytest.raises(ConfigError, match="better than itself"):
        session.prefer(0, 0)
    assert (rows(path), name_of(session)) == ([], "q0")


def test_undo_goes_back_step_by_step_to_where_the_session_began(path):
    RankingSession(begin(path)).prefer(0, 1)
    session = RankingSession(begin(path))
    first = session.question
    session.prefer(0, 1)
    session.pass_over(TIE)
    assert session.undo() and session.undo()
    assert session.question == first
    assert [row["prompt"][0]["content"] for row in rows(path)] == ["q0"]
    assert rows(path.with_suffix(".passed.jsonl")) == []
    assert not session.undo()
    assert [row["prompt"][0]["content"] for row in rows(path)] == ["q0"]
    session.prefer(1, 0)
    assert rows(path)[1]["chosen"][0]["content"] == first.answers[1].text


def test_undo_leaves_what_nobody_decided(path):
    """q1 has no two answers, and is passed over while the program samples ahead."""

    def sample(prompts, chunk):
        return [
            [Answer("same" if p.messages[0]["content"] == "q1" else t, {}) for t in ("a", "b")]
            for p in prompts
        ]

    session = RankingSession(begin(path, sample, chunk=1))
    session.prefer(0, 1)
    session.prepare()
    session.prepare()
    assert [row["prompt"][0]["content"] for row in rows(path.with_suffix(".passed.jsonl"))] == [
        "q1"
    ]
    assert session.undo()
    assert name_of(session) == "q0"
    assert rows(path) == []
    assert len(rows(path.with_suffix(".passed.jsonl"))) == 1


def test_what_cannot_be_undone_stays_as_it_was(path):
    """Another program wrote behind the last pick while answers were sampled ahead."""
    sampler = Sampler()

    def alike_later(prompts, chunk):
        return Sampler("same", "same")(prompts, chunk) if chunk else sampler(prompts, chunk)

    session = RankingSession(begin(path, alike_later, chunk=1))
    session.prefer(0, 1)
    session.prepare()  # nobody's pick stands behind the person's
    before = path.read_bytes()
    path.write_bytes(before + b'{"prompt": "of another", "chosen": "a", "rejected": "b"}\n')
    for _ in range(2):
        with pytest.raises(DataError, match="something else wrote behind the last pick"):
            session.undo()
        assert len(rows(path.with_suffix(".passed.jsonl"))) == 1
    path.write_bytes(before)
    assert session.undo()
    assert (rows(path), name_of(session)) == ([], "q0")
    assert len(rows(path.with_suffix(".passed.jsonl"))) == 1


def test_half_a_character_in_an_edit_is_refused_and_nothing_is_lost(path):
    session = RankingSession(begin(path))
    with pytest.raises(DataError, match="the edited answer` holds half a character"):
        session.improve(0, "better \ud800")
    assert rows(path) == []
    session.improve(0, "better")
    assert len(rows(path)) == 1


def test_rows_of_others_stay_and_are_not_undone(path):
    path.write_text('{"prompt": "x", "chosen": "y", "rejected": "z"}\n')
    session = RankingSession(begin(path))
    session.prefer(0, 1)
    with path.open("a") as file:
        file.write('{"prompt": "later", "chosen": "y", "rejected": "z"}\n')
    with pytest.raises(DataError, match="something else wrote behind the last pick"):
        session.undo()
    assert [row["prompt"] for row in rows(path)][::2] == ["x", "later"]


def test_a_line_that_a_crash_cut_short_is_taken_off_and_said(path):
    RankingSession(begin(path)).prefer(0, 1)
    whole = path.read_bytes()
    for cut in range(1, len(whole) - 1, 37):
        path.write_bytes(whole + whole[:cut])
        picks = PairsFile(path)
        assert picks.notes == [f"{path}: the last line was incomplete and has been removed"]
        assert path.read_bytes() == whole
        assert len(picks.order) == 1


def test_numbers_go_on_over_both_files(path):
    for decide in ("prefer", "pass", "prefer", "pass", "pass", "prefer"):
        session = RankingSession(begin(path))
        session.prefer(0, 1) if decide == "prefer" else session.pass_over(TIE)
    files = (path, path.with_suffix(".passed.jsonl"))
    numbers = [[row["provenance"]["number"] for row in rows(file)] for file in files]
    assert numbers == [[1, 3, 6], [2, 4, 5]]


def test_every_row_is_whole_json_on_its_own_line(path):
    session = RankingSession(begin(path, Sampler("line\nbreak \u2028 ü", "other")))
    session.prefer(0, 1)
    session.prefer(0, 1)
    lines = path.read_text("utf-8").split("\n")
    assert lines[-1] == ""
    assert len([json.loads(line) for line in lines[:-1]]) == 2
