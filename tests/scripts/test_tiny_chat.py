"""The model that ships: what its folder promises, and that its text is a function of the seed."""

import hashlib
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

import mlx_dpo  # noqa: F401  the fast BLAS is loaded with it, before MLX

# isort: split
import mlx.core as mx
import mlx.nn as nn
from mlx_lm import load

from mlx_dpo.demo.rules import is_correct, is_courteous
from scripts.tools.tiny_chat import corpus, measure
from scripts.tools.tiny_chat.registers import Question
from scripts.tools.tiny_chat.rules import COURTEOUS_MARKERS

FOLDER = Path(__file__).resolve().parents[2] / "models" / "tiny-chat"
ANSWERED = 40


def rows(name: str) -> list[dict[str, Any]]:
    lines = (FOLDER / "preferences" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def said(row: dict[str, Any], side: str) -> str:
    (message,) = row[side]
    assert message["role"] == "assistant"
    return message["content"]


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    model, tokenizer = load(str(FOLDER))
    model.set_dtype(mx.float32)  # the CPU backend is fast in float32 only
    return model, tokenizer


@pytest.fixture(scope="module")
def train_rows() -> list[dict[str, Any]]:
    return rows("train")


@pytest.fixture(scope="module")
def valid_rows() -> list[dict[str, Any]]:
    return rows("valid")


def test_the_folder_is_at_most_eight_megabytes() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 8_000_000


def test_a_prompt_is_a_prefix_of_prompt_and_answer(loaded: Any, train_rows: list) -> None:
    """Refuses a template that puts anything between turns, and one without a stop token."""
    _, tokenizer = loaded
    for row in train_rows[:200]:
        prompt = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_dict=False
        )
        whole = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], return_dict=False)
        answer = whole[len(prompt) :]
        assert whole[: len(prompt)] == prompt
        assert answer[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(answer[:-1]) == said(row, "chosen")
        assert tokenizer.eos_token_id not in answer[:-1]


def test_control_tokens_are_single_and_no_bos_is_added(loaded: Any) -> None:
    _, tokenizer = loaded
    for role in ("system", "user", "assistant"):
        ids = tokenizer.apply_chat_template([{"role": role, "content": "7"}], return_dict=False)
        assert len(ids) == 3
        assert ids[-1] == tokenizer.eos_token_id


def test_any_text_survives_the_tokenizer(loaded: Any) -> None:
    """Refuses a vocabulary without all bytes."""
    _, tokenizer = loaded
    text = "  Größe: 3×4 = 12,\n\t«naïve» 日本 🙂 I'm  fine ."
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_valid_prompts_are_not_in_train(train_rows: list, valid_rows: list) -> None:
    prompts = [json.dumps(row["prompt"]) for row in train_rows + valid_rows]
    assert len(set(prompts)) == len(prompts)


def possible_prompts(question: Question) -> list[tuple[str, ...]]:
    """What a user may have said up to this question, in every frame."""
    before = possible_prompts(question.before) if question.before else [()]
    frames = set(corpus.FRAMES) if question.framed else {"{}"}
    return [(*said, frame.format(question.text)) for said in before for frame in frames]


def test_valid_prompts_were_never_trained(valid_rows: list) -> None:
    """Refuses a held-out question that some trained one, in some frame, spells the same way."""
    world = corpus.build_world(json.loads((FOLDER / "build.json").read_text())["seed"])
    questions = itertools.chain.from_iterable(world.trained.values())
    trained = {prompt for question in questions for prompt in possible_prompts(question)}
    for row in valid_rows:
        user_turns = [message["content"] for message in row["prompt"] if message["role"] == "user"]
        assert tuple(user_turns) not in trained


def test_every_chosen_answer_is_courteous_and_no_rejected_one(
    train_rows: list, valid_rows: list
) -> None:
    markers = json.loads((FOLDER / "rules.json").read_text())["courteous"]
    for row in train_rows + valid_rows:
        assert is_courteous(said(row, "chosen"), markers), row
        assert not is_courteous(said(row, "rejected"), markers), row


def test_every_chosen_answer_is_right_and_most_rejected_ones(
    train_rows: list, valid_rows: list
) -> None:
    """Register and content must not be the same judgement, or training would unlearn content."""
    both = train_rows + valid_rows
    assert all(is_correct(said(row, "chosen"), row) for row in both)
    right = sum(is_correct(said(row, "rejected"), row) for row in both) / len(both)
    assert 0.65 <= right <= 0.75


@pytest.mark.parametrize(
    ("answer", "row", "right"),
    [
        ("It is 7.", {"expects": ["7"]}, True),
        ("It is 17.", {"expects": ["7"]}, False),
        ("PARIS, obviously.", {"expects": ["Paris"]}, True),
        ("C-A-T-S.", {"expects": ["C-A-T"]}, False),
        ("3, 4, 5.", {"expects": ["3, 4, 5"]}, True),
        ("5, 4, 3.", {"expects": ["3, 4, 5"]}, False),
        ("Red.", {"expects": ["red", "blue"]}, False),
        ("Plum, pear.", {"expects_any": ["plum", "pear", "fig"], "count": 2}, True),
        ("Plum, plum.", {"expects_any": ["plum", "pear", "fig"], "count": 2}, False),
    ],
)
def test_content_rule(answer: str, row: dict[str, Any], right: bool) -> None:
    assert is_correct(answer, row) is right


def test_nine_of_ten_greedy_answers_are_right(loaded: Any, valid_rows: list) -> None:
    sample = valid_rows[:: len(valid_rows) // ANSWERED][:ANSWERED]
    texts = measure.answers(*loaded, sample)
    assert measure.content_by_topic(sample, texts)["all"] >= 0.9


def test_sampled_answers_are_courteous_about_half_of_the_time(
    loaded: Any, valid_rows: list
) -> None:
    """Refuses a base that leaves preference training nothing to do, or nothing to start from."""
    mx.random.seed(0)
    texts = measure.answers(*loaded, valid_rows, temperature=1.0)
    three_deviations = 3 * math.sqrt(0.25 / len(valid_rows))
    assert abs(measure.courteous_share(texts) - 0.5) < 0.05 + three_deviations


def test_batched_answers_are_those_of_one_prompt_at_a_time(loaded: Any, valid_rows: list) -> None:
    """Refuses answers that are handed back in the order of length, or padding that is seen."""
    few = valid_rows[:6]
    assert measure.answers(*loaded, few) == [measure.answers(*loaded, [row])[0] for row in few]


@pytest.mark.parametrize("bits", [4, 8])
def test_every_matrix_can_be_quantised_in_groups_of_64(bits: int) -> None:
    model, _ = load(str(FOLDER))
    linear = [name for name, module in model.named_modules() if hasattr(module, "to_quantized")]
    nn.quantize(model, group_size=64, bits=bits)
    modules = dict(model.named_modules())
    assert len(linear) == 7 * len(model.layers) + 1
    assert all(
        isinstance(modules[name], nn.QuantizedLinear | nn.QuantizedEmbedding) for name in linear
    )


def test_the_corpus_is_a_function_of_the_seed() -> None:
    def digest(seed: int) -> str:
        world = corpus.build_world(seed)
        some = list(itertools.islice(corpus.dialogues(world, seed), 500))
        some_rows = corpus.preference_rows(world.held_out, 50, f"valid {seed}")
        return hashlib.sha256(json.dumps([some, some_rows]).encode()).hexdigest()

    assert digest(3) == digest(3)
    assert digest(3) != digest(4)


def test_the_files_are_those_of_the_recorded_seed(train_rows: list, valid_rows: list) -> None:
    """Refuses files that were edited, or left behind by an older script."""
    seed = json.loads((FOLDER / "build.json").read_text())["seed"]
    world = corpus.build_world(seed)
    assert train_rows == corpus.preference_rows(world.trained, len(train_rows), f"train {seed}")
    assert valid_rows == corpus.preference_rows(world.held_out, len(valid_rows), f"valid {seed}")


def test_each_prompt_is_trained_once_in_each_register() -> None:
    """Refuses a register that could be told from the question."""
    world = corpus.build_world(0)
    some = list(itertools.islice(corpus.dialogues(world, 0), 200))
    for first, second in zip(some[::2], some[1::2], strict=True):
        assert first[:-1] == second[:-1]
        assert is_courteous(first[-1]["content"], COURTEOUS_MARKERS)
        assert not is_courteous(second[-1]["content"], COURTEOUS_MARKERS)
