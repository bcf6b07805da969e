"""No command runs a model beyond the positions that it has learned, and each says what it does."""

import json

import mlx.core as mx
import pytest
from click.testing import CliRunner
from mlx_lm.models import gpt2

from mlx_dpo.cli import cli
from tests.checkpoints import make_gpt2_checkpoint

POSITIONS = 96
NOTE = f"The model's context is {POSITIONS} tokens, so some answers are limited"
REFUSED = (
    f"Error: `max_length` is 1,024, but the model has learned {POSITIONS} positions; "
    f"use --max-length {POSITIONS}\n"
)


@pytest.fixture(scope="module", autouse=True)
def checked_positions():
    """Fail where a model is called beyond its table; return the positions that were read."""
    call, read = gpt2.GPT2Model.__call__, []

    def checked(self, inputs, cache=None):
        offset = 0 if not cache or cache[0] is None else cache[0].offset
        end = int(mx.max(mx.array(offset)).item()) + inputs.shape[1]
        assert end <= self.n_positions, f"position {end} of {self.n_positions}"
        read.append(end)
        return call(self, inputs, cache)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt2.GPT2Model, "__call__", checked)
        yield read


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("context")
    make_gpt2_checkpoint(folder / "m", positions=POSITIONS)
    rows = [
        {"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": f"{i * 7} no"}
        for i in range(8)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.txt").write_text("".join(f"What is {n}?\n" for n in range(4)))
    (folder / "long.txt").write_text("Hi\n" + "word " * 60 + "\n")
    (folder / "reward.py").write_text("def length(prompt, answer):\n    return len(answer)\n")
    return folder


@pytest.fixture(autouse=True)
def place(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_DPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(folder)


TRAIN = ("train", "pairs.jsonl", "--model", "m", "--max-steps", "1", "--batch-size", "4")
REWARD = ("--reward", "reward.py:length")


def run(*words, stdin=None):
    result = CliRunner().invoke(cli, words, input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def trained(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLX_DPO_CACHE", str(folder / "cache"))
        result = run(*TRAIN, "--warmup-ratio", "0", "--max-length", "96", "--output", "run")
    assert result.exit_code == 0, result.stderr
    return "run"


@pytest.mark.parametrize(
    "words",
    [
        (*TRAIN, "--output", "new"),
        ("plan", "pairs.jsonl", "--model", "m"),
        ("loop", "prompts.txt", "--model", "m", "--output", "new", *REWARD),
    ],
    ids=lambda words: words[0],
)
def test_a_max_length_beyond_learned_positions_is_refused_before_any_work(words, folder):
    result = run(*words, "--max-length", "1024")
    assert (result.exit_code, result.stderr.endswith(REFUSED)) == (1, True), result.output
    assert not list(folder.glob("new/**/*.jsonl"))


def test_answers_of_default_length_end_at_the_context(trained, tmp_path, checked_positions):
    """`compare`, `winrate`, `collect` and `loop` say so, and go on."""
    prompts = ("--prompts", "prompts.txt", "--temperature", "1")
    pairs = str(tmp_path / "pairs.jsonl")
    loop = ("--max-length", "96", "--rounds", "1", "--output", str(tmp_path / "loop"))
    for words in (
        ("compare", trained, "prompts.txt"),
        ("winrate", trained, "prompts.txt", *REWARD),
        ("collect", trained, *prompts, "--output", pairs, *REWARD),
        ("loop", "prompts.txt", "--model", "m", *REWARD, *loop, "--warmup-ratio", "0",
         "--valid-fraction", "0"),
    ):  # fmt: skip
        checked_positions.clear()
        result = run(*words)
        assert result.exit_code == 0, result.output
        assert result.output.count(NOTE) == 1, result.output
        assert max(checked_positions) >= POSITIONS - 2, words  # to its end, and no further
        assert "raise --max-tokens" not in result.output


def test_a_single_answer_ends_at_the_context(checked_positions):
    greedy = ("--model", "m", "--temperature", "0")  # a sampled answer may end before the context
    for words, stdin in (
        (("generate", *greedy, "What is 3?"), None),
        (("chat", *greedy), "What is 3?\nWhat is 4?\n"),
    ):
        checked_positions.clear()
        result = run(*words, stdin=stdin)
        assert result.exit_code == 0, result.output
        assert "the model's context is full" in result.stderr
        assert max(checked_positions) >= POSITIONS - 2


@pytest.mark.parametrize(
    "words",
    [
        ("compare", "run", "long.txt"),
        ("winrate", "run", "long.txt", *REWARD),
        ("collect", "run", "--prompts", "long.txt", "--output", "c.jsonl", *REWARD),
    ],
    ids=lambda words: words[0],
)
def test_a_prompt_without_room_is_named_with_its_line(trained, words):
    result = run(*words)
    assert result.exit_code == 1
    assert "Error: long.txt:2: " in result.stderr
    assert f"leave no room for an answer (the context is {POSITIONS} tokens)" in (result.stderr)
