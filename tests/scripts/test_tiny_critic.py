"""The second model that ships: what its text teaches, and what its weights have taken from it."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

import mlx_dpo  # noqa: F401  the fast BLAS is loaded with it, before MLX

# isort: split
from tokenizers import Tokenizer

from mlx_dpo.collect.principles.principle_set import principle_rubric, read_principles
from mlx_dpo.demo.rules import is_correct, is_courteous
from mlx_dpo.evaluation.judge import ModelJudge, default_rubric, parse_verdict
from scripts.tools.tiny_chat import corpus
from scripts.tools.tiny_chat.build import encoded
from scripts.tools.tiny_chat.rules import COURTEOUS_MARKERS
from scripts.tools.tiny_critic import build, dialogues, measure, wordings

FOLDER = Path(__file__).resolve().parents[2] / "models" / "tiny-critic"
WORLD = corpus.build_world(0)
SENTENCES = wordings.build_wordings(0)
ROWS = 24


def polite(text: str) -> bool:
    return is_courteous(text, COURTEOUS_MARKERS)


def made(kind: str, count: int) -> list[list[corpus.Message]]:
    """`count` questions' dialogues of one kind, two for each question."""
    rng = random.Random(5)
    return [
        dialogue
        for _ in range(count)
        for dialogue in dialogues.MAKERS[kind](corpus.draw(WORLD.trained, rng), SENTENCES, rng)
    ]


@pytest.fixture(scope="module")
def revisions() -> list[list[corpus.Message]]:
    return made("revise", 300)


def asks_courtesy(dialogue: list[corpus.Message]) -> bool:
    return any(text in dialogue[-2]["content"] for text in SENTENCES.courtesy.trained)


def test_the_folder_is_at_most_five_megabytes() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 5_000_000


def test_the_prompts_are_those_of_the_recorded_seed_and_valid_ones_are_not_trained() -> None:
    seed = json.loads((FOLDER / "build.json").read_text())["seed"]
    world = corpus.build_world(seed)
    train, valid = (
        (FOLDER / "prompts" / f"{name}.txt").read_text("utf-8").splitlines()
        for name in ("train", "valid")
    )
    assert train == build.prompts(world.trained, len(train), f"train {seed}")
    assert valid == build.prompts(world.held_out, len(valid), f"valid {seed}")
    assert len(set(train) | set(valid)) == len(train) + len(valid)
    trained = {
        frame.format(question.text)
        for question in itertools.chain.from_iterable(world.trained.values())
        for frame in (corpus.FRAMES if question.framed else ["{}"])
        if question.before is None
    }
    assert set(train) <= trained
    assert not set(valid) & trained


def test_the_principles_of_the_folder_are_the_package_s_and_are_trained() -> None:
    lines = [principle.text for principle in read_principles(str(FOLDER / "principles.txt"))]
    assert lines == [principle.text for principle in read_principles("default")][: len(lines)]
    assert lines == list(wordings.SHIPPED_COURTESY)
    assert set(lines) <= set(SENTENCES.courtesy.trained)


def test_no_held_out_sentence_is_trained() -> None:
    """Refuses figures on «new» principles that some dialogue has, in any of its turns."""
    splits = [SENTENCES.courtesy, SENTENCES.neutral, SENTENCES.polite, SENTENCES.curt]
    held = [text for split in splits for text in split.held_out]
    assert len(held) > 100
    stages = [dialogues.dialogues(WORLD, SENTENCES, one.kinds, 0) for one in build.STAGES]
    stream = itertools.chain.from_iterable(itertools.islice(stage, 800) for stage in stages)
    asked = "\n".join(
        message["content"]
        for dialogue in stream
        for message in dialogue
        if message["role"] != "assistant"
    )
    # Some are the start of a longer one, such as «Be kind.»; those that are not must be absent.
    assert [text for text in held if f" {text} " in asked or f"\n{text}\n" in asked] == []
    assert wordings.CRITIQUE_REQUESTS[-1].split("{")[0] not in asked
    assert wordings.REVISION_REQUESTS[-1].split("{")[0] not in asked


def test_each_question_is_answered_once_in_each_register(revisions: list) -> None:
    """Refuses a principle or a question from which the register could be told."""
    for first, second in zip(revisions[::2], revisions[1::2], strict=True):
        assert first[:-5] == second[:-5]
        assert polite(first[-5]["content"])
        assert not polite(second[-5]["content"])


def test_a_revision_is_courteous_with_the_same_value_or_the_same_answer(revisions: list) -> None:
    """Refuses a revision that corrects, drops or changes what the answer said."""
    for dialogue in revisions:
        answer, fault, new = (dialogue[place]["content"] for place in (-5, -3, -1))
        if polite(answer) or not asks_courtesy(dialogue):
            assert new == answer
            assert not measure.found_fault(fault)
        else:
            assert polite(new)
            assert measure.found_fault(fault)


def test_a_revision_keeps_a_wrong_value_and_the_wrong_answer_is_not_trained() -> None:
    rng = random.Random(2)
    question = next(q for q in WORLD.trained["capital"] if q.reply.value == "Paris")
    wrong = dialogues.Answered(question, [], "Rome. Duh.", False, "Rome")
    assert "Rome" in dialogues.revision(wrong, True, rng)
    assert wrong.message["scored"] is False
    tokens = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    [ids] = encoded(tokens, iter([[wrong.message, dialogues.assistant("Rome.")]]))
    assert sum(ids.spoken) == len(tokens.encode("Rome.<|end|>").ids)


def test_a_critique_names_the_words_that_it_is_about() -> None:
    question = WORLD.trained["capital"][0]
    for text, words in (
        ("Paris. Are we done?", "Are we done?"),
        ("Look, it is Paris.", "Look"),
        ("Paris.", None),
        ("It is Paris. I hope that helps!", "I hope that helps!"),
    ):
        answer = dialogues.Answered(question, [], text, polite(text), None)
        said = dialogues.critique(answer, True, random.Random(0))
        assert measure.found_fault(said) is not polite(text)
        assert ('"' in said) is (words is not None)
        assert words is None or f'"{words}"' in said


def test_a_system_prompt_decides_the_register() -> None:
    for first, second in zip(*[iter(made("system", 100))] * 2, strict=True):
        for dialogue, texts in ((first, SENTENCES.polite), (second, SENTENCES.curt)):
            assert dialogue[0]["role"] == "system"
            assert dialogue[0]["content"].split("\n\n")[0] in texts.trained
            assert polite(dialogue[-1]["content"]) is (texts is SENTENCES.polite)


@pytest.mark.parametrize("principles", [[], list(wordings.SHIPPED_COURTESY)])
def test_the_judge_is_trained_on_the_messages_that_judges_get(principles: list[str]) -> None:
    """Refuses a rubric or a layout that has since changed in the package."""
    seen: list[Any] = []

    def keep(conversations: Any) -> list[str]:
        seen.extend(conversations)
        return ["[[C]]"] * len(conversations)

    rng = random.Random(1)
    prompt = corpus.prompt_messages(WORLD.trained["about it"][0], rng)
    assert len(prompt) > 1
    rubric = principle_rubric() if principles else default_rubric()
    judge = ModelJudge("m", keep, rubric)
    judge = judge.with_values(lambda _: {"{principles}": "\n".join(principles)})
    judge.rank([prompt], [["Paris.", "Gladly! Paris."]])
    assert seen[0] == [dialogues.judge_question(prompt, "Paris.", "Gladly! Paris.", principles)]
    assert seen[1] == [dialogues.judge_question(prompt, "Gladly! Paris.", "Paris.", principles)]


def test_verdicts_follow_the_order_and_are_read_by_the_package() -> None:
    for first, second in itertools.product((True, False), repeat=2):
        a, b = (dialogues.Answered(None, [], "", one, None) for one in (first, second))
        outcomes = measure.expected_outcomes(a, b)
        assert parse_verdict(dialogues.verdict(first, second)) == outcomes[0]
        assert parse_verdict(dialogues.verdict(second, first)) == outcomes[1]
        assert sum(outcomes) == 1


def test_the_text_is_a_function_of_the_seed() -> None:
    def some(seed: int) -> str:
        sentences = wordings.build_wordings(seed)
        kinds = dict.fromkeys(["plain", *dialogues.MAKERS], 1.0)
        stream = dialogues.dialogues(WORLD, sentences, kinds, seed)
        return json.dumps(list(itertools.islice(stream, 300)))

    assert some(1) == some(1)
    assert some(1) != some(2)


@pytest.fixture(scope="module")
def checked() -> measure.Measure:
    return measure.Measure(*build.loaded(FOLDER), WORLD, rows=ROWS, seed=3)


def test_curt_answers_are_criticised_and_become_courteous(checked: Any) -> None:
    """Content has a low bound: it is a known limit of these weights (models/README.md)."""
    answers = [row["rejected"][0]["content"] for row in checked.rows]
    cases = checked.revised(measure.SHIPPED, 0.0, answers)
    assert sum(polite(case.revision) for case in cases) >= ROWS - 2
    assert sum(measure.found_fault(case.critique) for case in cases) >= ROWS - 2
    right = [case for case in cases if is_correct(case.answer, case.row)]
    assert sum(is_correct(case.revision, case.row) for case in right) >= 0.6 * len(right)


def test_courteous_answers_pass_and_stay_courteous(checked: Any) -> None:
    answers = [row["chosen"][0]["content"] for row in checked.rows]
    cases = checked.revised(measure.SHIPPED, 0.0, answers)
    assert sum(not measure.found_fault(case.critique) for case in cases) >= ROWS - 3
    assert sum(polite(case.revision) for case in cases) >= ROWS - 4


def test_system_prompts_are_obeyed(checked: Any) -> None:
    contrast = [wordings.Split((), (text,)) for text in wordings.CONTRAST]
    for split, wanted in zip(contrast, (True, False), strict=True):
        assert checked.obedience(split, wanted=wanted)["obeyed"] >= 0.8
