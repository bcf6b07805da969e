import math

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.models import gemma3_text, mamba
from mlx_lm.models.cache import KVCache

from mlx_dpo.adapters.switch import AdapterSwitch
from mlx_dpo.chat.session import ChatSession
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.errors import ConfigError, ModelError
from mlx_dpo.generation.prompt import encode_prompt
from tests.checkpoints import END, VOCAB, make_checkpoint

QUESTIONS = ("Where is the cat?", "and the hat", "Is it here?", "no")
ASSISTANT = 2


@pytest.fixture(autouse=True, scope="module")
def uncompiled():
    """Disable compilation: compiling a sampling filter for the CPU takes seconds."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return mlx_lm.load(str(make_checkpoint(tmp_path_factory.mktemp("chat"))))


@pytest.fixture
def tokenizer(llama):
    """The loaded tokenizer; its template is restored after each test."""
    wrapped = llama[1]
    template = wrapped.chat_template
    yield wrapped
    wrapped.chat_template = template
    wrapped.has_chat_template = True


def sliding_window():
    return gemma3_text.Model(
        gemma3_text.ModelArgs(
            model_type="gemma3_text",
            hidden_size=32,
            num_hidden_layers=2,
            intermediate_size=48,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            vocab_size=VOCAB,
            sliding_window=64,
            sliding_window_pattern=2,
        )
    )


def state_space():
    return mamba.Model(
        mamba.ModelArgs(
            model_type="mamba",
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=64,
            state_size=8,
            num_hidden_layers=2,
            conv_kernel=4,
            use_bias=False,
            use_conv_bias=True,
            time_step_rank=4,
        )
    )


ARCHITECTURES = {"llama": None, "sliding_window": sliding_window, "state_space": state_space}


@pytest.fixture(params=ARCHITECTURES)
def model(request, llama):
    make = ARCHITECTURES[request.param]
    if make is None:
        return llama[0]
    mx.random.seed(5)
    return add_noise(make())


def add_noise(model):
    """Add noise to the weights, so that the logits differ clearly."""
    noise = {"scale": 1.5, "key": mx.random.key(7)}
    model.apply(lambda w: w + mx.random.normal(w.shape, **noise) / math.sqrt(w.shape[-1]))
    return model


class FixedAnswerModel:
    """A fake model that answers every prompt with the given text."""

    def __init__(self, tokenizer, text, *, fail_at=None):
        self.layers = [None]
        self.pass_lengths = []  # tokens per forward pass
        self._fail_at = fail_at
        self._answer = [*tokenizer.encode(text, add_special_tokens=False), END]
        self._position = 0

    def __call__(self, tokens, cache):
        self.pass_lengths.append(tokens.shape[1])
        if len(self.pass_lengths) == self._fail_at:
            raise KeyboardInterrupt
        nothing = mx.zeros((1, 1, tokens.shape[1], 1))
        cache[0].update_and_fetch(nothing, nothing)
        self._position = 0 if tokens[0, -1].item() == ASSISTANT else self._position + 1
        next_token = self._answer[min(self._position, len(self._answer) - 1)]
        return mx.where(mx.arange(VOCAB) == next_token, 9.0, 0.0)[None, None]


class ThinkingTokenizer:
    """A tokenizer whose template opens the thinking at the end of the prompt."""

    def __init__(self, tokenizer, marks):
        self._tokenizer = tokenizer
        self.__dict__ |= marks

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __len__(self):
        return len(self._tokenizer)

    def rfind_think_start(self, tokens):
        return len(tokens) - 1

    def rfind_think_end(self, tokens):
        return -1


def ask(chat, text):
    """Return the whole answer and its summary."""
    pieces = list(chat.reply(text))
    assert all(piece.summary is None for piece in pieces[:-1])
    return "".join(piece.text for piece in pieces), pieces[-1].summary


def greedy_answer_without_cache(model, tokenizer, messages, limit, penalty=1.0):
    """Return the greedy answer; each token is from a forward pass over the whole prefix."""
    tokens = encode_prompt(tokenizer, messages)
    answer = []
    while len(answer) < limit:
        logits = model(mx.array([tokens]))[0, -1].tolist()
        for token in set(tokens[-20:]):
            logits[token] = logits[token] * penalty ** (1 if logits[token] < 0 else -1)
        answer.append(max(range(len(logits)), key=logits.__getitem__))
        if answer[-1] == END:
            break
        tokens = [*tokens, answer[-1]]
    return tokenizer.decode([token for token in answer if token != END])


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_every_answer_equals_the_one_computed_without_a_cache(model, tokenizer, penalty):
    chat = ChatSession(model, tokenizer, Sampling(max_tokens=24, repetition_penalty=penalty))
    messages = []
    for question in QUESTIONS:
        messages.append(user(question))
        expected = greedy_answer_without_cache(model, tokenizer, messages, 24, penalty)
        answer, _ = ask(chat, question)
        assert answer == expected
        messages.append(assistant(answer))
    assert chat.turns == messages


def test_the_repetition_penalty_applies_to_cached_tokens(tokenizer):
    """Logits: `a` 9, `b` 8, `c` 7; halved for the last 20 tokens of the conversation."""
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "abc"]
    logits = mx.zeros((1, 1, VOCAB))
    logits[0, 0, letters] = mx.array([9.0, 8.0, 7.0])

    class ConstantLogitsModel(FixedAnswerModel):
        def __call__(self, tokens, cache):
            super().__call__(tokens, cache)
            return logits

    chat = ChatSession(
        ConstantLogitsModel(tokenizer, ""),
        tokenizer,
        Sampling(max_tokens=1, repetition_penalty=2.0),
    )
    assert ask(chat, "a")[0] == "b"
    answer, summary = ask(chat, "?")
    assert answer == "c"
    assert summary.prompt_tokens - summary.cached_tokens < 20


def test_only_the_tokens_of_the_new_turn_are_computed(tokenizer):
    model = FixedAnswerModel(tokenizer, "The cat sat.")
    chat = ChatSession(model, tokenizer, Sampling())
    ask(chat, "Where is the cat?")
    cached = len(tokenizer.apply_chat_template(chat.turns))
    model.pass_lengths.clear()
    _, summary = ask(chat, "Why?")
    new = tokenizer.encode("<|user|>Why?<|end|><|assistant|>", add_special_tokens=False)
    assert summary.cached_tokens == cached
    assert summary.prompt_tokens == cached + len(new)
    # mlx-lm first computes all tokens of a prompt but the last.
    assert model.pass_lengths[:3] == [len(new) - 1, 1, 1]


def test_a_cache_that_cannot_be_trimmed_is_recomputed_when_the_prefix_changes(tokenizer):
    """The template shortens earlier turns, so the second prompt does not begin with the first."""
    tokenizer.chat_template = tokenizer.chat_template.replace("content", "content[:3]")
    mx.random.seed(1)
    model = add_noise(state_space())
    chat = ChatSession(model, tokenizer, Sampling(max_tokens=9))
    messages = []
    for question in QUESTIONS[:3]:
        messages.append(user(question))
        expected = greedy_answer_without_cache(model, tokenizer, messages, 9)
        answer, summary = ask(chat, question)
        assert answer == expected
        assert summary.cached_tokens == 0
        messages.append(assistant(answer))


def test_an_answer_closed_early_stays_in_the_turns(llama, tokenizer):
    chat = ChatSession(llama[0], tokenizer, Sampling(max_tokens=30))
    pieces = chat.reply("Where is the cat?")
    partial = "".join(next(pieces).text for _ in range(7))
    pieces.close()
    assert chat.turns == [user("Where is the cat?"), assistant(partial)]
    expected = greedy_answer_without_cache(
        llama[0], tokenizer, [*chat.turns, user("and the hat")], 30
    )
    assert ask(chat, "and the hat")[0] == expected


def test_after_ctrl_c_within_a_forward_pass_the_chat_answers_correctly(llama, tokenizer):
    model, calls = llama[0], []

    class Interrupted(type(model)):
        def __call__(self, *args, **kwargs):
            calls.append(1)
            result = super().__call__(*args, **kwargs)
            if len(calls) == 6:
                raise KeyboardInterrupt  # the token is in the cache but not in the chat
            return result

    plain = type(model)
    chat = ChatSession(model, tokenizer, Sampling(max_tokens=30))
    model.__class__ = Interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            list(chat.reply("Where is the cat?"))
    finally:
        model.__class__ = plain
    assert len(chat.turns) == 2
    expected = greedy_answer_without_cache(model, tokenizer, [*chat.turns, user("no")], 30)
    assert ask(chat, "no")[0] == expected


def test_after_ctrl_c_before_a_forward_pass_cache_and_chat_agree(llama, tokenizer, monkeypatch):
    model = llama[0]
    chat = ChatSession(model, tokenizer, Sampling(max_tokens=8))
    ask(chat, "Where is the cat?")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("mlx_dpo.generation.stream.make_logits_processors", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(chat.reply("and the hat"))
    expected = greedy_answer_without_cache(model, tokenizer, [*chat.turns, user("and the hat")], 8)
    assert ask(chat, "and the hat")[0] == expected


def test_ctrl_c_before_the_first_token_removes_the_question(tokenizer):
    chat = ChatSession(FixedAnswerModel(tokenizer, "yes", fail_at=1), tokenizer, Sampling())
    with pytest.raises(KeyboardInterrupt):
        list(chat.reply("Where is the cat?"))
    assert chat.turns == []


def test_characters_of_several_tokens_are_never_split(tokenizer):
    text = "dog 🐶, naïve 日本"
    assert len(tokenizer.encode("🐶", add_special_tokens=False)) == 4
    pieces = [
        p.text
        for p in ChatSession(FixedAnswerModel(tokenizer, text), tokenizer, Sampling()).reply("?")
    ]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert "🐶" in pieces  # streamed as soon as it is complete


def test_an_answer_keeps_its_leading_space(tokenizer):
    assert ask(
        ChatSession(FixedAnswerModel(tokenizer, " on the hill"), tokenizer, Sampling()), "?"
    )[0] == (" on the hill")


def test_the_summary_counts_the_answer_without_its_end_token(tokenizer):
    model = FixedAnswerModel(tokenizer, "abc")
    assert len(tokenizer.encode("abc", add_special_tokens=False)) == 3
    answer, summary = ask(ChatSession(model, tokenizer, Sampling()), "?")
    assert (answer, summary.tokens, summary.finish_reason) == ("abc", 3, "stop")
    answer, summary = ask(ChatSession(model, tokenizer, Sampling(max_tokens=2)), "?")
    assert (answer, summary.tokens, summary.finish_reason) == ("ab", 2, "length")


def test_an_answer_ends_at_the_end_of_the_context(tokenizer):
    model = FixedAnswerModel(tokenizer, "abcdefghij")
    prompt = len(tokenizer.apply_chat_template([user("?")], add_generation_prompt=True))
    chat = ChatSession(model, tokenizer, Sampling(), context=prompt + 4)
    answer, summary = ask(chat, "?")
    assert (answer, summary.finish_reason) == ("abcd", "context")
    with pytest.raises(ConfigError, match=r"^the question: \d+ tokens leave no room .* context is"):
        ask(chat, "and what now?")
    assert len(chat.turns) == 2
    with pytest.raises(ConfigError, match="leave no room"):
        ask(ChatSession(model, tokenizer, Sampling(), context=prompt), "?")


def test_a_seed_repeats_the_answers_and_reset_restarts_the_sampler(llama, tokenizer):
    sampling = Sampling(temperature=1.0, top_p=0.95, top_k=50, min_p=0.01, seed=3, max_tokens=12)
    chat = ChatSession(llama[0], tokenizer, sampling)
    first = [ask(chat, question)[0] for question in QUESTIONS[:2]]
    chat.reset()
    assert [ask(chat, question)[0] for question in QUESTIONS[:2]] == first
    other = ChatSession(llama[0], tokenizer, Sampling(temperature=1.0, seed=4, max_tokens=12))
    assert ask(other, QUESTIONS[0])[0] != first[0]


def test_the_random_seed_of_a_session_repeats_its_answers(llama, tokenizer):
    chat = ChatSession(llama[0], tokenizer, Sampling(temperature=1.0, max_tokens=12))
    again = ChatSession(llama[0], tokenizer, chat.sampling)
    assert ask(chat, "?")[0] == ask(again, "?")[0]


def test_a_chat_neither_reads_nor_changes_the_global_random_state(llama, tokenizer):
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=3, max_tokens=6)
    mx.random.seed(0)
    first = ask(ChatSession(llama[0], tokenizer, sampling), "?")[0]
    drawn = mx.random.uniform().item()
    mx.random.seed(0)
    assert mx.random.uniform().item() == drawn
    assert ask(ChatSession(llama[0], tokenizer, sampling), "?")[0] == first


def test_the_system_message_comes_first(tokenizer):
    model = FixedAnswerModel(tokenizer, "ok")
    plain = ask(ChatSession(model, tokenizer, Sampling()), "?")[1].prompt_tokens
    system = tokenizer.encode("<|system|>Be brief.<|end|>", add_special_tokens=False)
    chat = ChatSession(model, tokenizer, Sampling(), system="Be brief.")
    assert ask(chat, "?")[1].prompt_tokens == plain + len(system)


def test_each_answer_keeps_the_system_message_of_its_prompt(llama, tokenizer):
    """Rows and the other model's answer use that message, not the one that was set later."""
    switch = AdapterSwitch(llama[0])
    switch.save_state("base")
    chat = ChatSession(
        llama[0], tokenizer, Sampling(max_tokens=4), system="Be brief.", switch=switch
    )
    brief = ask(chat, "?")[1].prompt_tokens
    chat.set_system("Be kind and take all the time you need.")
    brief_message = {"role": "system", "content": "Be brief."}
    assert chat.last_prompt() == (brief_message, user("?"))
    *_, last = chat.answer_with("base")
    assert last.summary.prompt_tokens == brief
    assert chat.last_prompt() == (brief_message, user("?"))
    ask(chat, "!")
    assert (
        chat.last_prompt()[0]["content"] == chat.system == "Be kind and take all the time you need."
    )
    chat.undo()
    assert chat.last_prompt() == (brief_message, user("?"))
    chat.sampling = Sampling(max_tokens=4, temperature=1.0, seed=1)
    list(chat.retry())
    assert chat.last_prompt()[0]["content"] == chat.system
    chat.set_system(None)
    assert chat.last_prompt()[0]["role"] == "system"


def test_a_persons_answer_is_never_split_into_thinking_and_answer(tokenizer):
    marks = {"has_thinking": True, "think_start": "<t>", "think_end": "</t>"}
    thinking = ThinkingTokenizer(tokenizer, marks)
    chat = ChatSession(FixedAnswerModel(tokenizer, "hm</t>ok"), thinking, Sampling())
    ask(chat, "?")
    assert chat.last_answer() == "ok"
    chat.replace_answer("better", "person")
    assert chat.last_answer() == "better"


def test_a_model_thinks_only_if_thinking_is_enabled(tokenizer):
    tokenizer.chat_template += "{% if enable_thinking %}Hm{% endif %}"
    hm = len(tokenizer.encode("Hm", add_special_tokens=False))
    lengths = {}
    for thinking in (None, False, True):
        chat = ChatSession(
            FixedAnswerModel(tokenizer, "ok"), tokenizer, Sampling(max_tokens=1), thinking=thinking
        )
        lengths[thinking] = ask(chat, "?")[1].prompt_tokens
    assert lengths[None] == lengths[False] == lengths[True] - hm


@pytest.mark.parametrize(
    ("template", "settings", "message"),
    [
        (None, {"thinking": False}, "`thinking` has no effect; .* has no thinking mode"),
        ("{{ messages[-1].content }}", {"system": "x"}, "`system` has no effect; .* ignores it"),
        (None, {"raw": True, "system": "x"}, "`system` has no effect: no chat template is used"),
        (None, {"raw": True, "thinking": True}, "`thinking` has no effect: no chat template"),
    ],
)
def test_settings_that_the_template_ignores_are_rejected(tokenizer, template, settings, message):
    if template:
        tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=message):
        ChatSession(FixedAnswerModel(tokenizer, ""), tokenizer, Sampling(), **settings)


def test_top_k_must_be_below_the_vocabulary_size(tokenizer):
    with pytest.raises(ConfigError, match="`top_k` must be below the vocabulary size of 300"):
        ChatSession(
            FixedAnswerModel(tokenizer, ""), tokenizer, Sampling(temperature=1, top_k=VOCAB)
        )


def test_a_template_that_rejects_the_conversation_gives_a_one_line_error(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    chat = ChatSession(FixedAnswerModel(tokenizer, ""), tokenizer, Sampling())
    with pytest.raises(ModelError, match=r"refuses the conversation \(System role not supported\)"):
        ask(chat, "?")
    assert chat.turns == []


def test_without_a_template_the_text_is_continued(tokenizer):
    tokenizer.has_chat_template = False
    model = FixedAnswerModel(tokenizer, " sat")
    chat = ChatSession(model, tokenizer, Sampling(max_tokens=2))
    assert chat.raw
    prompts = [ask(chat, text)[1].prompt_tokens for text in ("The cat", "The hat")]
    texts = ("The cat", f"The cat\n{chat.turns[1]['content']}\nThe hat")
    assert prompts == [len(tokenizer.encode(text)) for text in texts]


def test_the_cache_holds_exactly_the_tokens_it_lists(llama, tokenizer):
    """An error of one token in the count would shift every later turn."""
    chat = ChatSession(llama[0], tokenizer, Sampling(max_tokens=5))
    for question in QUESTIONS:
        ask(chat, question)
        cache = chat._caches["base"]
        [*layers] = cache.layers
        assert all(isinstance(layer, KVCache) for layer in layers)
        assert {layer.offset for layer in layers} == {len(cache.tokens)}
