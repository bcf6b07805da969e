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


class FakeSampler:
    """Samples answers that name their chunk and prompt, and records the calls."""

    def __init__(self, *texts):
        self.texts = texts or ("yes", "no")
        self.calls = []

    def __call__(self, prompts, chunk):
        self.calls.append((chunk, [prompt.messages[0]["content"] for prompt in prompts]))
        return [
            [
                Answer(text and f"{text} {chunk} {prompt.messages[0]['content']}", {"index": n})
                for n, text in enumerate(self.texts)
            ]
            for prompt in prompts
        ]


def make_tasks(path, sampler=None, names=NAMES, chunk=4, seed=0):
    prompts = [make_prompt(name) for name in names]
    return TaskSampler(
        prompts, PairsFile(path), sampler or FakeSampler(), chunk_size=chunk, seed=seed
    )


def rows(path):
    return [row.record for row in read_rows(path)] if path.exists() else []


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pairs.jsonl"


def current_prompt(session):
    return session.current_task.prompt.messages[0]["content"]


def test_a_decision_is_a_preference_row_with_its_provenance(path):
    session = RankingSession(make_tasks(path))
    texts = [answer.text for answer in session.current_task.answers]
    session.prefer(1, 0)
    [row] = rows(path)
    assert row["prompt"] == [{"role": "user", "content": "q0"}]
    assert row["chosen"] == [{"role": "assistant", "content": texts[1]}]
    assert row["rejected"] == [{"role": "assistant", "content": texts[0]}]
    provenance = row["provenance"]
    assert (provenance["number"], provenance["by"]) == (1, "person")
    index = {"yes": 0, "no": 1}
    assert provenance["chosen_from"] == {"index": index[texts[1].split()[0]]}
    assert provenance["rejected_from"] == {"index": index[texts[0].split()[0]]}


def test_the_order_of_answers_is_random_and_reproducible(path):
    names = [f"q{n}" for n in range(200)]
    [tasks] = make_tasks(path, names=names, chunk=200).chunks()
    first = sum(task.answers[0].source["index"] for task in tasks)
    assert 70 < first < 130
    [again] = make_tasks(path, names=names, chunk=200).chunks()
    assert [task.answers for task in again] == [task.answers for task in tasks]
    [other] = make_tasks(path, names=names, chunk=200, seed=1).chunks()
    assert [task.answers for task in other] != [task.answers for task in tasks]


def test_decided_prompts_are_not_repeated_and_chunks_keep_their_numbers(path):
    session = RankingSession(make_tasks(path))
    session.prefer(0, 1)
    session.skip(TIE)
    session.skip(SKIPPED)
    sampler = FakeSampler()
    again = RankingSession(make_tasks(path, sampler))
    remaining = []
    while again.current_task:
        remaining.append(again.current_task)
        again.skip(SKIPPED)
    assert [task.prompt.messages[0]["content"] for task in remaining] == ["q3", "q4", "q5"]
    # A chunk in progress is sampled as a whole with its own number: the answers are the same.
    assert sampler.calls == [(0, NAMES[:4]), (1, NAMES[4:])]
    assert RankingSession(make_tasks(path, FakeSampler())).current_task is None


def test_a_decided_chunk_is_not_sampled(path):
    session = RankingSession(make_tasks(path, names=NAMES[:4]))
    for _ in range(4):
        session.prefer(0, 1)
    sampler = FakeSampler()
    assert current_prompt(RankingSession(make_tasks(path, sampler))) == "q4"
    assert [chunk for chunk, _ in sampler.calls] == [1]


def test_a_tie_goes_to_the_file_of_skipped_prompts_with_its_answers(path):
    session = RankingSession(make_tasks(path))
    texts = [answer.text for answer in session.current_task.answers]
    session.skip(TIE)
    assert rows(path) == []
    [row] = rows(path.with_suffix(".passed.jsonl"))
    assert (row["passed"], row["answers"]) == ("tie", texts)


@pytest.mark.parametrize(
    ("texts", "why"),
    [(("same", "same"), IDENTICAL), (("", "one"), EMPTY), (("", ""), IDENTICAL)],
)
def test_tasks_without_two_different_answers_are_never_shown(path, texts, why):
    sampler = FakeSampler(*texts)
    assert RankingSession(make_tasks(path, sampler)).current_task is None
    skipped = rows(path.with_suffix(".passed.jsonl"))
    assert [row["passed"] for row in skipped] == [why] * 6
    assert [row["provenance"]["by"] for row in skipped] == ["nobody"] * 6


def test_answers_that_differ_only_in_whitespace_are_identical(path):
    def sample_with_spaces(prompts, chunk):
        return [[Answer("same", {}), Answer("same\n", {})] for _ in prompts]

    assert RankingSession(make_tasks(path, sample_with_spaces)).current_task is None
    assert {row["passed"] for row in rows(path.with_suffix(".passed.jsonl"))} == {IDENTICAL}


def test_only_distinct_answers_are_shown(path):
    task = RankingSession(make_tasks(path, FakeSampler("a", "b", "a", "", "b"))).current_task
    assert sorted(answer.source["index"] for answer in task.answers) == [0, 1]


def test_an_edited_answer_is_preferred_to_the_original(path):
    session = RankingSession(make_tasks(path))
    original = session.current_task.answers[1]
    session.edit(1, "  mine\n")
    [row] = rows(path)
    assert row["chosen"] == [{"role": "assistant", "content": "mine"}]
    assert row["rejected"] == [{"role": "assistant", "content": original.text}]
    assert row["provenance"]["edited"] is True
    assert row["provenance"]["rejected_from"] == original.source
    assert "chosen_from" not in row["provenance"]


def test_an_unchanged_edit_is_rejected(path):
    session = RankingSession(make_tasks(path))
    for text in ("", "  \n", session.current_task.answers[0].text + " "):
        with pytest.raises(ConfigError, match="empty or unchanged"):
            session.edit(0, text)
    with pytest.raises(ConfigError, match="better than itself"):
        session.prefer(0, 0)
    assert (rows(path), current_prompt(session)) == ([], "q0")


def test_undo_goes_back_step_by_step_to_the_start_of_the_session(path):
    RankingSession(make_tasks(path)).prefer(0, 1)
    session = RankingSession(make_tasks(path))
    first = session.current_task
    session.prefer(0, 1)
    session.skip(TIE)
    assert session.undo() and session.undo()
    assert session.current_task == first
    assert [row["prompt"][0]["content"] for row in rows(path)] == ["q0"]
    assert rows(path.with_suffix(".passed.jsonl")) == []
    assert not session.undo()
    assert [row["prompt"][0]["content"] for row in rows(path)] == ["q0"]
    session.prefer(1, 0)
    assert rows(path)[1]["chosen"][0]["content"] == first.answers[1].text


def test_undo_does_not_remove_automatically_skipped_prompts(path):
    """q1 has identical answers and is skipped while the program samples ahead."""

    def sample(prompts, chunk):
        return [
            [Answer("same" if p.messages[0]["content"] == "q1" else t, {}) for t in ("a", "b")]
            for p in prompts
        ]

    session = RankingSession(make_tasks(path, sample, chunk=1))
    session.prefer(0, 1)
    session.sample_chunk()
    session.sample_chunk()
    assert [row["prompt"][0]["content"] for row in rows(path.with_suffix(".passed.jsonl"))] == [
        "q1"
    ]
    assert session.undo()
    assert current_prompt(session) == "q0"
    assert rows(path) == []
    assert len(rows(path.with_suffix(".passed.jsonl"))) == 1


def test_a_failed_undo_changes_nothing(path):
    """Another program wrote after the last decision while answers were sampled ahead."""
    sampler = FakeSampler()

    def identical_later(prompts, chunk):
        return FakeSampler("same", "same")(prompts, chunk) if chunk else sampler(prompts, chunk)

    session = RankingSession(make_tasks(path, identical_later, chunk=1))
    session.prefer(0, 1)
    session.sample_chunk()  # an automatic decision follows the person's
    before = path.read_bytes()
    path.write_bytes(before + b'{"prompt": "of another", "chosen": "a", "rejected": "b"}\n')
    for _ in range(2):
        with pytest.raises(DataError, match="another program wrote after the last decision"):
            session.undo()
        assert len(rows(path.with_suffix(".passed.jsonl"))) == 1
    path.write_bytes(before)
    assert session.undo()
    assert (rows(path), current_prompt(session)) == ([], "q0")
    assert len(rows(path.with_suffix(".passed.jsonl"))) == 1


def test_half_a_character_in_an_edit_is_rejected_and_the_task_stays(path):
    session = RankingSession(make_tasks(path))
    with pytest.raises(DataError, match="the edited answer` contains an unpaired surrogate"):
        session.edit(0, "better \ud800")
    assert rows(path) == []
    session.edit(0, "better")
    assert len(rows(path)) == 1


def test_rows_of_other_programs_are_never_undone(path):
    path.write_text('{"prompt": "x", "chosen": "y", "rejected": "z"}\n')
    session = RankingSession(make_tasks(path))
    session.prefer(0, 1)
    with path.open("a") as file:
        file.write('{"prompt": "later", "chosen": "y", "rejected": "z"}\n')
    with pytest.raises(DataError, match="another program wrote after the last decision"):
        session.undo()
    assert [row["prompt"] for row in rows(path)][::2] == ["x", "later"]


def test_an_incomplete_line_after_a_crash_is_removed_and_reported(path):
    RankingSession(make_tasks(path)).prefer(0, 1)
    whole = path.read_bytes()
    for cut in range(1, len(whole) - 1, 37):
        path.write_bytes(whole + whole[:cut])
        pairs_file = PairsFile(path)
        assert pairs_file.notes == [f"{path}: the last line was incomplete and has been removed"]
        assert path.read_bytes() == whole
        assert len(pairs_file.decisions) == 1


def test_decisions_are_numbered_across_both_files(path):
    for action in ("prefer", "skip", "prefer", "skip", "skip", "prefer"):
        session = RankingSession(make_tasks(path))
        session.prefer(0, 1) if action == "prefer" else session.skip(TIE)
    files = (path, path.with_suffix(".passed.jsonl"))
    numbers = [[row["provenance"]["number"] for row in rows(file)] for file in files]
    assert numbers == [[1, 3, 6], [2, 4, 5]]


def test_every_row_is_complete_json_on_its_own_line(path):
    session = RankingSession(make_tasks(path, FakeSampler("line\nbreak \u2028 ü", "other")))
    session.prefer(0, 1)
    session.prefer(0, 1)
    lines = path.read_text("utf-8").split("\n")
    assert lines[-1] == ""
    assert len([json.loads(line) for line in lines[:-1]]) == 2


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("a.jsonl", {"provenance": {"number": 1}}, "`prompt` must be text or a list of messages"),
        ("a.jsonl", {"prompt": "Hi", "provenance": {"number": 1, "chosen_from": "x"}},
         "`chosen_from` must be an object, found str"),
        ("a.passed.jsonl", {"prompt": "Hi", "provenance": {"number": 1}}, "`passed` must be text"),
    ],
)  # fmt: skip
def test_a_stored_decision_of_another_form_is_named(tmp_path, name, row, message):
    (tmp_path / name).write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=f":1: {message}"):
        PairsFile(tmp_path / "a.jsonl")
