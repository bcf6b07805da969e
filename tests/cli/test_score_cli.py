import json

import pytest
from click.testing import CliRunner

from mlx_dpo import evaluate_run
from mlx_dpo.cli import cli
from mlx_dpo.data.report import PairsReport
from mlx_dpo.evaluation.run_reward import open_run_reward
from mlx_dpo.evaluation.winrate import wilson_interval
from mlx_dpo.saved_runs import score_rows
from mlx_dpo.schemas.schema import Row, RowRules
from tests.trained_run import train


def score(*arguments, stdin=None):
    return CliRunner().invoke(cli, ["score", *map(str, arguments)], input=stdin)


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def reward(trained):
    """Return a function that computes the reward of an answer to a prompt."""
    judge = open_run_reward(f"run:{trained}/run")

    def of(prompt, answer):
        [ranking] = judge.rank([[{"role": "user", "content": prompt}]], [[answer]])
        return ranking.scores[0]

    return of


def test_pairs_keep_their_columns_and_get_the_rewards_of_eval(trained, reward):
    result = score(trained / "run", trained / "pairs.jsonl")
    assert result.exit_code == 0, result.output
    rows, given = lines(result.stdout), lines((trained / "pairs.jsonl").read_text())
    assert [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows] == given
    for row in rows:
        assert row["reward_chosen"] == pytest.approx(reward(row["prompt"], row["chosen"]), abs=1e-5)
        gap = row["reward_chosen"] - row["reward_rejected"]
        assert row["reward_margin"] == pytest.approx(gap)
    metrics = evaluate_run(str(trained / "run"), str(trained / "pairs.jsonl")).metrics
    for name, value in (("chosen", metrics.chosen_rewards), ("rejected", metrics.rejected_rewards)):
        mean = sum(row[f"reward_{name}"] for row in rows) / len(rows)
        assert mean == pytest.approx(value, abs=1e-5)
    assert "beta times log π / π_ref, beta = 0.1" in result.stderr
    assert f"{metrics.accuracies:.1%}" in result.stderr


def test_answers_are_scored_alone_or_in_messages_with_or_without_a_label(trained, reward, tmp_path):
    turn = {"role": "user", "content": "What is 3?"}
    rows = [
        {"prompt": "What is 3?", "completion": "It is 3."},
        {"messages": [turn, {"role": "assistant", "content": "It is 3."}], "id": 7},
        {"prompt": "What is 3?", "completion": "It is 3.", "label": False},
        {"instruction": "What is 3?", "input": "", "output": "It is 3."},
        {"prompt": "What is 3?", "chosen": "It is 3.", "rejected": "no"},
    ]
    result = score(
        trained / "run", write(tmp_path / "rows.jsonl", rows), "-o", tmp_path / "o.jsonl"
    )
    assert result.exit_code == 0, result.output
    *single, pair = lines((tmp_path / "o.jsonl").read_text())
    wanted = reward("What is 3?", "It is 3.")
    assert [row.pop("reward") for row in single] == pytest.approx([wanted] * 4, abs=1e-5)
    assert single == rows[:4]
    assert pair["reward_chosen"] == pytest.approx(wanted, abs=1e-5)
    assert f"mean reward of 4 single answers: {wanted:.3f}" in result.stdout


def test_accuracy_is_that_of_each_subset_and_of_all_with_an_interval(trained, reward, tmp_path):
    pairs = [("Who?", "It is 3, friend.", "7 no"), ("Why?", "4 no", "It is 4, friend.")]
    rows = [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected, "subset": subset}
        for subset, count in (("chat", 3), ("safety", 1))
        for prompt, chosen, rejected in (pairs * count)[: 2 * count - 1]
    ]
    result = score(trained / "run", write(tmp_path / "bench.jsonl", rows), "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)  # no rows besides the summary
    margins = [reward(p, c) - reward(p, r) for p, c, r in pairs]
    assert margins[0] > 0 > margins[1]
    chat, safety = figures["subsets"]["chat"], figures["subsets"]["safety"]
    assert (chat["pairs"], chat["accuracy"]) == (5, 3 / 5)
    assert chat["interval_95"] == pytest.approx(wilson_interval(3, 5))
    assert (safety["pairs"], safety["accuracy"]) == (1, 1)
    assert (figures["pairs"], figures["accuracy"], figures["ties"]) == (6, 4 / 6, 0)
    assert figures["mean_margin"] == pytest.approx((4 * margins[0] + 2 * margins[1]) / 6, abs=1e-5)
    assert figures["rows"].endswith("bench.jsonl")
    assert len(figures["reward_adapter_digest"]) == 64


def test_a_row_is_a_block_of_its_own_or_one_of_many_with_the_same_reward(
    trained, tmp_path, monkeypatch
):
    whole = lines(score(trained / "run", trained / "pairs.jsonl").stdout)
    monkeypatch.setattr(score_rows, "BLOCK_SIZE", 1)
    alone = lines(score(trained / "run", trained / "pairs.jsonl").stdout)
    for row, other in zip(whole, alone, strict=True):
        assert row["reward_margin"] == pytest.approx(other["reward_margin"], abs=1e-5)


def test_only_a_block_of_rows_is_read_before_its_rewards_are_there(trained, monkeypatch):
    monkeypatch.setattr(score_rows, "BLOCK_SIZE", 2)
    rewards, read = open_run_reward(f"run:{trained}/run").rewards, []

    def rows():
        for n in range(9):
            read.append(n)
            record = {"prompt": f"What is {n}?", "chosen": "a b", "rejected": "c"}
            yield Row(record, f"here:{n}")

    report = PairsReport("here", 99)
    found = score_rows.score_rows(rewards, rows(), RowRules(), report)
    next(found)
    assert read == [0, 1]


def test_rows_too_long_for_the_context_are_left_out_and_counted(trained, reward, tmp_path):
    beyond = {"prompt": "Why?", "completion": "word " * 600}
    # Longer than the run's `max_length` of 512 allows is longer than the context, too.
    rows = [beyond, {"prompt": "Why?", "completion": "a"}]
    result = score(trained / "run", write(tmp_path / "rows.jsonl", rows))
    assert result.exit_code == 0, result.output
    [row] = lines(result.stdout)
    assert row["reward"] == pytest.approx(reward("Why?", "a"), abs=1e-5)
    assert "left out 1 pair: the pair is too long (:1)" in result.stderr


def test_texts_longer_than_in_training_are_scored_whole(trained, reward, tmp_path):
    train(trained, output=str(tmp_path / "run"), max_length=16, max_steps=1, epochs=None)
    judge = open_run_reward(f"run:{tmp_path}/run")
    rows = [{"prompt": "What is 3?", "completion": "It is 3, my friend, and no other number."}]
    [row] = lines(score(tmp_path / "run", write(tmp_path / "rows.jsonl", rows)).stdout)
    ask = [[{"role": "user", "content": "What is 3?"}]]
    [ranking] = judge.rank(ask, [[rows[0]["completion"]]])
    assert row["reward"] == pytest.approx(ranking.scores[0], abs=1e-6)
    half = judge.rank(ask, [["It is 3, my"]])[0].scores[0]
    assert abs(row["reward"] - half) > 1e-4


def test_of_a_conversation_the_last_answer_is_scored_after_the_others(trained, tmp_path):
    roles = ("user", "assistant") * 2
    texts = ("Who?", "The cat sat.", "What is 3?", "It is 3.")
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    path = write(tmp_path / "rows.jsonl", [{"messages": turns}])
    [row] = lines(score(trained / "run", path).stdout)
    [ranking] = open_run_reward(f"run:{trained}/run").rank([turns[:3]], [["It is 3."]])
    assert row["reward"] == pytest.approx(ranking.scores[0], abs=1e-5)


def test_rated_completions_are_a_row_or_make_a_row_for_each_pair(trained, reward, tmp_path):
    texts = ("no", "It is 3.", "3")
    answers = [{"response": text, "overall_score": n} for n, text in enumerate(texts)]
    rows = [{"prompt": "What is 3?", "completions": answers, "subset": "sums"}]
    [row] = lines(score(trained / "run", write(tmp_path / "rows.jsonl", rows)).stdout)
    assert row["completions"] == answers
    assert row["reward_chosen"] == pytest.approx(reward("What is 3?", "3"), abs=1e-5)
    rewards = open_run_reward(f"run:{trained}/run").rewards
    report, rules = PairsReport("here", 99), RowRules(ranked="all")
    found = list(score_rows.score_rows(rewards, [Row(rows[0], "here:1")], rules, report))
    records = [scored.with_rewards().record for scored in found]
    pairs = {(record["chosen"], record["rejected"]) for record in records}
    assert pairs == {("3", "It is 3."), ("3", "no"), ("It is 3.", "no")}
    assert {(record["prompt"], record["subset"]) for record in records} == {("What is 3?", "sums")}
    for record in records:
        wanted = reward("What is 3?", record["chosen"])
        assert record["reward_chosen"] == pytest.approx(wanted, abs=1e-5)


def test_columns_of_other_names_are_read_and_written_as_they_are(trained, reward, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"question": "Why?", "completion": "a"}])
    result = score(trained / "run", path, "--column", "prompt=question")
    assert result.exit_code == 0, result.output
    [row] = lines(result.stdout)
    assert row.pop("reward") == pytest.approx(reward("Why?", "a"), abs=1e-5)
    assert row == {"question": "Why?", "completion": "a"}


PAIR = {"prompt": "Why?", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (PAIR | {"reward_margin": 1}, "rows.jsonl:2: the row has a column `reward_margin` already"),
        (PAIR | {"rejected": ""}, "rows.jsonl:2: a completion is empty"),
        ({"words": "a"}, "rows.jsonl:2: missing `chosen`"),
        ({"prompt": "Why?", "completion": 3}, "rows.jsonl:2: `completion` must be text"),
        ({"prompt": "Why?", "completion": " "}, "rows.jsonl:2: a completion is empty"),
    ],
)
def test_a_bad_row_is_an_error_of_one_line_and_no_file_is_written(trained, tmp_path, row, message):
    path = write(tmp_path / "rows.jsonl", [PAIR, row])
    result = score(trained / "run", path, "-o", tmp_path / "out.jsonl")
    assert result.exit_code == 1
    assert message in result.stderr.splitlines()[-1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl"]


def test_bad_rows_can_be_dropped_and_are_counted(trained, tmp_path):
    path = write(tmp_path / "rows.jsonl", [PAIR | {"rejected": ""}, PAIR])
    result = score(trained / "run", path, "--bad-pairs", "drop", "--json")
    figures = json.loads(result.stdout)
    assert (figures["pairs"], figures["left_out"]) == (1, {"a completion is empty": 1})
    assert "left out 1 pair: a completion is empty (:1)" in result.stderr
    only = write(tmp_path / "only.jsonl", [PAIR | {"rejected": ""}])
    none = score(trained / "run", only, "--bad-pairs", "drop", "-o", tmp_path / "o.jsonl")
    assert none.exit_code == 1
    assert not (tmp_path / "o.jsonl").exists()


def test_an_existing_file_is_not_replaced(trained, tmp_path):
    (tmp_path / "out.jsonl").write_text("mine")
    result = score(trained / "run", trained / "pairs.jsonl", "-o", tmp_path / "out.jsonl")
    assert (result.exit_code, (tmp_path / "out.jsonl").read_text()) == (1, "mine")
    assert "already exists" in result.stderr


def test_rows_from_stdin_go_to_stdout(trained):
    result = score(trained / "run", "-", stdin=json.dumps(PAIR))
    assert [row["prompt"] for row in lines(result.stdout)] == ["Why?"]
