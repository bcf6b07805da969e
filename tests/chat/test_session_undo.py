"""Switching models, undo, retry, replaced answers, and a full context."""

import mlx.core as mx
import mlx_lm
import pytest

from mlx_dpo.adapters.attach import attach_adapters
from mlx_dpo.adapters.switch import AdapterSwitch
from mlx_dpo.chat.session import ChatSession
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.errors import ConfigError
from tests.checkpoints import make_checkpoint

QUESTIONS = ("Where is the cat?", "and the hat", "Is it here?")
GREEDY = Sampling(max_tokens=12)
SAMPLED = Sampling(max_tokens=12, temperature=1.0, seed=5)


@pytest.fixture(autouse=True, scope="module")
def uncompiled():
    """Disable compilation: compiling a sampling filter for the CPU takes seconds."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("chat")))


@pytest.fixture(scope="module")
def base(folder):
    return mlx_lm.load(folder)


@pytest.fixture
def switchable(folder):
    model, tokenizer = mlx_lm.load(folder)
    switch = AdapterSwitch(model)
    switch.save_state("base")
    attach_adapters(model, rank=4, scale=8.0)
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.lora_b = mx.random.normal(module.lora_b.shape, key=mx.random.key(2)) * 0.2
    switch.save_state("aligned")
    return model, tokenizer, switch


def ask(chat, text):
    return "".join(piece.text for piece in chat.reply(text))


def join(pieces):
    return "".join(piece.text for piece in pieces)


def user(text):
    return {"role": "user", "content": text}


def test_base_answers_equal_those_of_the_base_loaded_alone_after_ten_switches(switchable, base):
    """In one conversation each: the aligned model's answers in between have no effect."""
    model, tokenizer, switch = switchable
    chat, alone = ChatSession(model, tokenizer, GREEDY, switch=switch), ChatSession(*base, GREEDY)
    for question in QUESTIONS:
        switch.activate("base")
        assert ask(chat, question) == ask(alone, question)
        for _ in range(5):
            switch.activate("aligned")
            aligned = join(chat.answer_with("aligned"))
            assert aligned != chat.last_answer()
            switch.activate("base")
            assert join(chat.answer_with("base")) == chat.last_answer()
    assert chat.turns == alone.turns
    assert chat.authors == ["base"] * 3


def test_each_model_continues_from_its_own_cache(switchable):
    model, tokenizer, switch = switchable
    chat = ChatSession(model, tokenizer, GREEDY, switch=switch)
    ask(chat, QUESTIONS[0])
    *_, last = chat.answer_with("base")
    assert last.summary.cached_tokens == 0
    *_, last = chat.answer_with("base")
    assert last.summary.cached_tokens == last.summary.prompt_tokens - 1
    *_, last = chat.reply(QUESTIONS[1])
    assert last.summary.cached_tokens > 0
    fresh = ChatSession(model, tokenizer, GREEDY, switch=switch)
    fresh.turns = chat.turns[:2]
    assert ask(fresh, QUESTIONS[1]) == chat.last_answer()


def test_answering_with_the_other_model_changes_neither_conversation_nor_model(switchable):
    model, tokenizer, switch = switchable
    chat = ChatSession(model, tokenizer, GREEDY, switch=switch)
    ask(chat, QUESTIONS[0])
    before = list(chat.turns)
    pieces = chat.answer_with("base")
    next(pieces)
    assert switch.active == "base"
    pieces.close()
    assert (chat.turns, chat.authors, switch.active) == (before, ["aligned"], "aligned")


def test_undo_removes_a_question_with_its_answer(base):
    chat = ChatSession(*base, GREEDY)
    first = ask(chat, QUESTIONS[0])
    second = ask(chat, QUESTIONS[1])
    assert chat.undo() == QUESTIONS[1]
    assert chat.turns == [user(QUESTIONS[0]), {"role": "assistant", "content": first}]
    assert ask(chat, QUESTIONS[1]) == second
    chat.undo(), chat.undo()
    with pytest.raises(ConfigError, match="there is no answer yet"):
        chat.undo()


def test_retry_replaces_the_last_answer(base):
    chat = ChatSession(*base, SAMPLED)
    ask(chat, QUESTIONS[0])
    before = ask(chat, QUESTIONS[1])
    again = join(chat.retry())
    assert again != before
    assert [turn["content"] for turn in chat.turns[2:]] == [QUESTIONS[1], again]
    assert len(chat.authors) == 2


def test_a_retry_that_fails_at_once_keeps_the_earlier_answer(base):
    chat = ChatSession(*base, SAMPLED)
    answer = ask(chat, QUESTIONS[0])
    pieces = chat.retry()
    chat.context = 1
    with pytest.raises(ConfigError, match="leave no room"):
        next(pieces)
    assert chat.last_answer() == answer
    assert chat.authors == ["base"]


def test_retry_is_rejected_if_the_answer_would_be_identical(base):
    chat = ChatSession(*base, GREEDY)
    ask(chat, QUESTIONS[0])
    with pytest.raises(ConfigError, match="with `temperature` 0 the answer is always the same"):
        next(chat.retry())


def test_the_model_reads_the_replaced_answer_in_the_next_turn(base):
    chat = ChatSession(*base, GREEDY)
    ask(chat, QUESTIONS[0])
    chat.replace_answer("On the mat.", "person")
    other = ChatSession(*base, GREEDY)
    other.turns = [user(QUESTIONS[0]), {"role": "assistant", "content": "On the mat."}]
    assert ask(chat, QUESTIONS[1]) == ask(other, QUESTIONS[1])
    assert chat.authors == ["person", "base"]


def test_the_last_prompt_is_all_that_the_model_read_before_its_answer(base):
    chat = ChatSession(*base, GREEDY, system="Be brief.")
    first = ask(chat, QUESTIONS[0])
    ask(chat, QUESTIONS[1])
    system = {"role": "system", "content": "Be brief."}
    answer = {"role": "assistant", "content": first}
    assert chat.last_prompt() == (system, user(QUESTIONS[0]), answer, user(QUESTIONS[1]))
    raw = ChatSession(*base, GREEDY, raw=True)
    first = ask(raw, "The cat")
    ask(raw, "The hat")
    assert raw.last_prompt() == f"The cat\n{first}\nThe hat"


def test_a_system_message_can_be_set_and_cleared(base):
    chat = ChatSession(*base, GREEDY)
    without_system = ask(chat, QUESTIONS[0])
    chat.reset()
    chat.set_system("Be brief.")
    assert ask(chat, QUESTIONS[0]) == ask(
        ChatSession(*base, GREEDY, system="Be brief."), QUESTIONS[0]
    )
    chat.reset()
    chat.set_system(None)
    assert ask(chat, QUESTIONS[0]) == without_system


def test_when_the_context_is_full_the_oldest_turns_are_dropped(base):
    chat = ChatSession(*base, Sampling(max_tokens=8), context=64)
    dropped = []
    for number in range(12):
        *_, last = chat.reply(f"Question {number}, where is the cat?")
        dropped.append(last.summary.dropped_turns)
        assert last.summary.prompt_tokens + last.summary.tokens <= 64
        assert last.summary.finish_reason in ("stop", "length")
        assert [turn["role"] for turn in chat.turns[:2]] == ["user", "assistant"]
    assert dropped[0] == 0
    assert sum(dropped) > 0
    assert len(chat.turns) == 2 * 12 - sum(dropped)
    assert len(chat.authors) == 12  # the last authors belong to the remaining turns
    fresh = ChatSession(*base, Sampling(max_tokens=8))
    fresh.turns = chat.turns[:-2]
    assert ask(fresh, chat.turns[-2]["content"]) == chat.turns[-1]["content"]


def test_thinking_stays_in_the_conversation_but_not_in_the_answer(base):
    model, tokenizer = base
    marks = tokenizer._think_start, tokenizer._think_end
    tokens = tokenizer._think_start_tokens, tokenizer._think_end_tokens
    tokenizer._think_start, tokenizer._think_end = "<t>", "</t>"
    tokenizer._think_start_tokens, tokenizer._think_end_tokens = (60,), (61,)
    try:
        chat = ChatSession(model, tokenizer, GREEDY)
        ask(chat, "Why?")
        chat.replace_answer("<t>hm\n</t>\n\nSo.\n", "base")
        assert chat.turns[-1]["content"] == "<t>hm\n</t>\n\nSo.\n"
        assert chat.last_answer() == "So."
    finally:
        tokenizer._think_start, tokenizer._think_end = marks
        tokenizer._think_start_tokens, tokenizer._think_end_tokens = tokens
