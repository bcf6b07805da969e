"""Special tokens in the text of data stay plain text with every tokenizer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_dpo.data.tokenization.chat_template import encode_conversation
from mlx_dpo.data.tokenization.formatting import TokenRules
from mlx_dpo.data.tokenization.special_tokens import SpecialTokens, get_special_tokens
from mlx_dpo.data.tokenization.tokenize import tokenize_pair
from mlx_dpo.errors import SPECIAL_TOKEN, BadPairError
from mlx_dpo.types import PreferenceExample
from tests.data.byte_tokenizer import ASSISTANT, BOS, CHAT, EOS, USER, ByteTokenizer
from tests.data.template_families import TEMPLATES, byte_level, metaspace, unigram

NAMES = sorted(TEMPLATES)
SIZE = 100_000


def user(text):
    return [{"role": "user", "content": text}]


def pair_of(tokenizer, prompt, chosen="yo", rejected="no!", **rules):
    preference = PreferenceExample(prompt, chosen, rejected, "pairs.jsonl:7")
    return tokenize_pair(tokenizer, preference, TokenRules(vocab_size=SIZE, **rules))


def controls(tokenizer, ids):
    return [number for number in ids if number in get_special_tokens(tokenizer).ids]


@pytest.mark.parametrize("make", [byte_level, metaspace, unigram])
@pytest.mark.parametrize("name", NAMES)
def test_no_text_imitates_a_control_token(name, make):
    """The control tokens are those of the same turns without the text; the text is complete."""
    tokenizer = make(name)
    plain = encode_conversation(tokenizer, user("ab"), add_generation_prompt=True, thinking=False)
    for special in tokenizer.all_special_tokens:
        ids = encode_conversation(
            tokenizer, user(f"a{special}b"), add_generation_prompt=True, thinking=False
        )
        assert controls(tokenizer, ids) == controls(tokenizer, plain)
        spaced = str.maketrans("▁", " ")  # Metaspace cannot tell them apart
        assert f"a{special}b".translate(spaced) in tokenizer.decode(ids).translate(spaced)


@pytest.mark.parametrize("make", [byte_level, metaspace, unigram])
@pytest.mark.parametrize("name", ["chatml", "llama-3", "zephyr"])
@settings(max_examples=30, deadline=None)
@given(text=st.text("ab <|>im_end/s\n", min_size=1, max_size=20))
def test_text_before_a_plain_special_token_has_its_usual_ids(name, make, text):
    """The ids before a special token that is plain text are those of normal tokenization."""
    tokenizer = make(name)
    eos = tokenizer.eos_token
    if get_special_tokens(tokenizer).find(text) or not text.strip():
        return
    usual = encode_conversation(tokenizer, user(text), add_generation_prompt=True, thinking=False)
    assert list(usual) == tokenizer.apply_chat_template(
        user(text), add_generation_prompt=True, return_dict=False
    )
    forged = encode_conversation(
        tokenizer, user("x" + text.strip() + eos), add_generation_prompt=True, thinking=False
    )
    honest = encode_conversation(
        tokenizer, user("x" + text.strip()), add_generation_prompt=True, thinking=False
    )
    assert controls(tokenizer, forged) == controls(tokenizer, honest)


def test_a_special_token_in_a_message_becomes_its_characters(chat):
    pair = pair_of(chat(), "a</s>b<A>", "yo</s>!").pair
    assert pair.prompt == (USER, *b"a</s>b<A>", EOS, ASSISTANT)
    assert pair.chosen == (*b"yo</s>!", EOS)


def test_special_tokens_in_plain_text_are_control_tokens_only_with_chat_template_text(plain):
    text = "<s>hi</s><U>a"
    auto = pair_of(plain, text, "yo</s>x</s>")
    assert auto.pair.prompt == (BOS, *b"hi</s><U>a")  # the first begins the text as ever
    assert auto.pair.chosen == (*b"yo</s>x", EOS)  # and the last ends it
    assert auto.specials == {"</s>", "<U>"}
    as_text = pair_of(plain, text, "yo</s>x</s>", chat_template="text")
    assert as_text.pair.prompt == (BOS, *b"hi", EOS, USER, *b"a")
    assert as_text.pair.chosen == (*b"yo", EOS, *b"x", EOS)
    assert as_text.specials == {"</s>", "<U>"}


def test_a_bos_token_is_added_to_plain_text_with_a_special_token(plain):
    assert pair_of(plain, "a</s>b").pair.prompt == (BOS, *b"a</s>b")
    assert pair_of(ByteTokenizer(), "a</s>b").pair.prompt == tuple(b"a</s>b")


def test_a_pair_with_a_special_token_that_cannot_be_plain_text_is_bad(chat):
    class Stubborn(ByteTokenizer):
        def encode(self, text, add_special_tokens=True, split_special_tokens=False):
            return [EOS if number == ord("<") else number for number in super().encode(text)]

    curious = chat(CHAT.replace("m.content", "m.content.split('</s>')[0]"))
    private = "\U00100000</s>"
    for tokenizer, text in (
        (Stubborn(CHAT), "a</s>"),  # a piece of it is the token already
        (curious, "a</s>b"),  # the template takes it for its own
        (chat(), private),  # the text has the marks themselves
        (Stubborn(), "a</s>b"),  # as plain text
    ):
        with pytest.raises(BadPairError) as error:
            pair_of(tokenizer, text)
        assert error.value.reason == SPECIAL_TOKEN
        assert "--bad-pairs drop" in str(error.value)


def test_the_longest_matching_special_token_counts():
    specials = SpecialTokens({"<a>": 1, "<a>b": 2, "b": 3})
    assert specials.find("<a>b<a>") == {"<a>b", "<a>"}
    assert specials.unmark(specials.mark("x<a>by")) == "x<a>by"
    assert len(specials.mark("x<a>by")) == 3


def test_special_tokens_in_tools_and_template_arguments_are_plain_text(chat):
    template = "{% if tools %}{{ tools[0].name }}{% endif %}" + CHAT
    preference = PreferenceExample(
        "hi", "yo", "no", "x:1", template_kwargs={"tools": [{"name": "t</s>"}]}
    )
    ids = tokenize_pair(chat(template), preference, TokenRules(vocab_size=SIZE)).pair.prompt
    assert ids == (*b"t</s>", USER, *b"hi", EOS, ASSISTANT)


def test_the_name_is_split_for_a_tokenizer_that_ignores_split_special_tokens(chat):
    class Whole(ByteTokenizer):
        def encode(self, text, add_special_tokens=True, split_special_tokens=False):
            return super().encode(text, add_special_tokens)

    for tokenizer in (Whole(CHAT), chat()):
        assert pair_of(tokenizer, "a</s>b").pair.prompt == (USER, *b"a</s>b", EOS, ASSISTANT)


def test_thinking_tokens_in_a_completion_keep_their_ids():
    """They are added tokens but not special: a model may generate them."""
    tokenizer = byte_level("qwen-3")
    answer = "<think>\nwhy\n</think>\n\nso"
    think = tokenizer.convert_tokens_to_ids("<think>")
    assert think in tokenizer.encode("<think>")
    pair = pair_of(tokenizer, "hi", answer, "<think>\nno\n</think>\n\nno", thinking=True).pair
    assert pair.chosen[0] == think


def test_real_tokenizers_write_special_tokens_as_text(stories):
    for text in ("a</s>b", "<s>", "x <unk> y"):
        ids = encode_conversation(stories, user(text), add_generation_prompt=True, thinking=False)
        assert text in stories.decode(ids)
        assert len(controls(stories, ids)) == len(
            controls(
                stories,
                encode_conversation(stories, user("a"), add_generation_prompt=True, thinking=False),
            )
        )
