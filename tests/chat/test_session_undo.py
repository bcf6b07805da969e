"""What can be done to a conversation beside asking: sides, undo, retry, and a full context."""

import mlx.core as mx
import mlx_lm
import pytest

from mlx_dpo.adapters.attach import attach
from mlx_dpo.adapters.switch import Sides
from mlx_dpo.chat.session import ChatSession
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.errors import ConfigError
from tests.checkpoints import make_checkpoint

QUESTIONS = ("Where is the cat?", "and the hat", "Is it here?")
GREEDY = Sampling(max_tokens=12)
WARM = Sampling(max_tokens=12, temperature=1.0, seed=5)


@pytest.fixture(autouse=True, scope="module")
def uncompiled():
    """Compiling a filter for the CPU takes seconds."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("chat")))


@pytest.fixture(scope="module")
def plain(folder):
    return mlx_lm.load(folder)


@pytest.fixture
def two_sided(folder):
    model, tokenizer = mlx_lm.load(folder)
    sides = Sides(model)
    sides.keep("base")
    attach(model, rank=4, scale=8.0)
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.lora_b = mx.random.normal(module.lora_b.shape, key=mx.random.key(2)) * 0.2
    sides.keep("aligned")
    return model, tokenizer, sides


def say(chat, text):
    return "".join(piece.text for piece in chat.reply(text))


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


def user(text):
    return {"role": "user", "content": text}


def test_base_answers_are_those_of_the_base_alone_before_and_after_ten_switches(two_sided, plain):
    """In one conversation each: the aligned side's answers in between leave no trace."""
    model, tokenizer, sides = two_sided
    chat, alone = ChatSession(model, tokenizer, GREEDY, sides=sides), ChatSession(*plain, GREEDY)
    for question in QUESTIONS:
        sides.put("base")
        assert say(chat, question) == say(alone, question)
        for _ in range(5):
            sides.put("aligned")
            aligned = text_of(chat.other_answer("aligned"))
            assert aligned != chat.last_answer()
            sides.put("base")
            assert text_of(chat.other_answer("base")) == chat.last_answer()
    assert chat.turns == alone.turns
    assert chat.authors == ["base"] * 3


def test_each_side_goes_on_from_its_own_cache(two_sided):
    model, tokenizer, sides = two_sided
    chat = ChatSession(model, tokenizer, GREEDY, sides=sides)
    say(chat, QUESTIONS[0])
    *_, last = chat.other_answer("base")
    assert last.summary.cached_tokens == 0
    *_, last = chat.other_answer("base")
    assert last.summary.cached_tokens == last.summary.prompt_tokens - 1
    *_, last = chat.reply(QUESTIONS[1])
    assert last.summary.cached_tokens > 0
    fresh = ChatSession(model, tokenizer, GREEDY, sides=sides)
    fresh.turns = chat.turns[:2]
    assert say(fresh, QUESTIONS[1]) == chat.last_answer()


def test_the_other_answer_leaves_conversation_and_side_as_they_were(two_sided):
    model, tokenizer, sides = two_sided
    chat = ChatSession(model, tokenizer, GREEDY, sides=sides)
    say(chat, QUESTIONS[0])
    before = list(chat.turns)
    pieces = chat.other_answer("base")
    next(pieces)
    assert sides.now == "base"
    pieces.close()
    assert (chat.turns, chat.authors, sides.now) == (before, ["aligned"], "aligned")


def test_undo_takes_back_a_question_with_its_answer(plain):
    chat = ChatSession(*plain, GREEDY)
    first = say(chat, QUESTIONS[0])
    second = say(chat, QUESTIONS[1])
    assert chat.undo() == QUESTIONS[1]
    assert chat.turns == [user(QUESTIONS[0]), {"role": "assistant", "content": first}]
    assert say(chat, QUESTIONS[1]) == second
    chat.undo(), chat.undo()
    with pytest.raises(ConfigError, match="nothing has been said yet"):
        chat.undo()


def test_retry_puts_another_answer_in_the_place_of_the_last(plain):
    chat = ChatSession(*plain, WARM)
    say(chat, QUESTIONS[0])
    before = say(chat, QUESTIONS[1])
    again = text_of(chat.retry())
    assert again != before
    assert [turn["content"] for turn in chat.turns[2:]] == [QUESTIONS[1], again]
    assert len(chat.authors) == 2


def test_a_retry_that_never_begins_keeps_the_answer_there_is(plain):
    chat = ChatSession(*plain, WARM)
    answer = say(chat, QUESTIONS[0])
    pieces = chat.retry()
    chat.context = 1
    with pytest.raises(ConfigError, match="leave no room"):
        next(pieces)
    assert chat.last_answer() == answer
    assert chat.authors == ["base"]


def test_retry_is_refused_where_the_answer_would_be_the_same(plain):
    chat = ChatSession(*plain, GREEDY)
    say(chat, QUESTIONS[0])
    with pytest.raises(ConfigError, match="with `temperature` 0 the answer is always the same"):
        next(chat.retry())


def test_a_replaced_answer_is_what_the_model_reads_next(plain):
    chat = ChatSession(*plain, GREEDY)
    say(chat, QUESTIONS[0])
    chat.replace("On the mat.", "person")
    other = ChatSession(*plain, GREEDY)
    other.turns = [user(QUESTIONS[0]), {"role": "assistant", "content": "On the mat."}]
    assert say(chat, QUESTIONS[1]) == say(other, QUESTIONS[1])
    assert chat.authors == ["person", "base"]


def test_what_was_asked_is_all_that_the_model_saw_before_its_answer(plain):
    chat = ChatSession(*plain, GREEDY, system="Be brief.")
    first = say(chat, QUESTIONS[0])
    say(chat, QUESTIONS[1])
    system = {"role": "system", "content": "Be brief."}
    answer = {"role": "assistant", "content": first}
    assert chat.asked() == (system, user(QUESTIONS[0]), answer, user(QUESTIONS[1]))
    raw = ChatSession(*plain, GREEDY, raw=True)
    first = say(raw, "The cat")
    say(raw, "The hat")
    assert raw.asked() == f"The cat\n{first}\nThe hat"


def test_a_system_message_can_come_and_go(plain):
    chat = ChatSession(*plain, GREEDY)
    bare = say(chat, QUESTIONS[0])
    chat.reset()
    chat.instruct("Be brief.")
    assert say(chat, QUESTIONS[0]) == say(
        ChatSession(*plain, GREEDY, system="Be brief."), QUESTIONS[0]
    )
    chat.reset()
    chat.instruct(None)
    assert say(chat, QUESTIONS[0]) == bare


def test_when_the_context_is_full_the_oldest_questions_are_left_out(plain):
    chat = ChatSession(*plain, Sampling(max_tokens=8), context=64)
    shortened = []
    for number in range(12):
        *_, last = chat.reply(f"Question {number}, where is the cat?")
        shortened.append(last.summary.left_out)
        assert last.summary.prompt_tokens + last.summary.tokens <= 64
        assert last.summary.finish_reason in ("stop", "length")
        assert [turn["role"] for turn in chat.turns[:2]] == ["user", "assistant"]
    assert shortened[0] == 0
    assert sum(shortened) > 0
    assert len(chat.turns) == 2 * 12 - sum(shortened)
    assert len(chat.authors) == 12  # the last ones belong to the turns that are left
    after = ChatSession(*plain, Sampling(max_tokens=8))
    after.turns = chat.turns[:-2]
    assert say(after, chat.turns[-2]["content"]) == chat.turns[-1]["content"]


def test_thinking_is_kept_in_the_conversation_and_left_out_of_the_answer(plain):
    model, tokenizer = plain
    marks = tokenizer._think_start, tokenizer._think_end
    tokens = tokenizer._think_start_tokens, tokenizer._think_end_tokens
    tokenizer._think_start, tokenizer._think_end = "<t>", "</t>"
    tokenizer._think_start_tokens, tokenizer._think_end_tokens = (60,), (61,)
    try:
        chat = ChatSession(model, tokenizer, GREEDY)
        say(chat, "Why?")
        chat.replace("<t>hm\n</t>\n\nSo.\n", "base")
        assert chat.turns[-1]["content"] == "<t>hm\n</t>\n\nSo.\n"
        assert chat.last_answer() == "So."
    finally:
        tokenizer._think_start, tokenizer._think_end = marks
        tokenizer._think_start_tokens, tokenizer._think_end_tokens = tokens
