from dataclasses import replace

import pytest

from mlx_dpo.data.tokenization.formatting import TokenRules
from mlx_dpo.data.tokenization.tokenize import check_token_rules, tokenize_pair
from mlx_dpo.errors import (
    EMPTY_COMPLETION,
    EMPTY_PROMPT,
    SAME_TOKENS,
    BadPairError,
    ConfigError,
    DataError,
    ModelError,
)
from mlx_dpo.types import PreferenceExample
from tests.data.byte_tokenizer import (
    ASSISTANT,
    BOS,
    CHAT,
    EOS,
    SYSTEM,
    TWO_LINES,
    USER,
    ByteTokenizer,
)


def rules(**given):
    return TokenRules(**({"vocab_size": 262} | given))


def strings(prompt="hi", chosen="yo", rejected="no!"):
    return PreferenceExample(prompt, chosen, rejected, "pairs.jsonl:7")


def messages(*turns, chosen="yo", rejected="no!"):
    prompt = tuple({"role": role, "content": content} for role, content in turns)
    replies = ({"role": "assistant", "content": text} for text in (chosen, rejected))
    return PreferenceExample(prompt, *((reply,) for reply in replies), location="pairs.jsonl:7")


def ids(*parts):
    return tuple(i for p in parts for i in (p.encode() if isinstance(p, str) else [p]))


def test_the_completion_starts_after_the_generation_prompt_and_ends_with_the_stop_token(chat):
    encoded = tokenize_pair(chat(), strings(), rules())
    pair = encoded.pair
    assert pair.prompt == ids(USER, "hi", EOS, ASSISTANT)
    assert (pair.chosen, pair.rejected) == (ids("yo", EOS), ids("no!", EOS))
    assert pair.location == "pairs.jsonl:7"
    assert encoded.as_chat
    assert not (encoded.truncated or encoded.stops_added or encoded.boundary_moved)


def test_messages_keep_their_roles_and_their_order(chat):
    preference = messages(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"))
    pair = tokenize_pair(chat(), preference, rules()).pair
    assert pair.prompt == ids(
        SYSTEM, "s", EOS, USER, "a", EOS, ASSISTANT, "b", EOS, USER, "c", EOS, ASSISTANT
    )
    assert pair.chosen == ids("yo", EOS)


def test_a_real_tokenizer_splits_the_template_as_trl_does(stories):
    """TRL: prompt ids are template(prompt, generation prompt), the rest of the whole follows."""
    preference = messages(("user", "Once upon"), chosen="a time", rejected="there")
    pair = tokenize_pair(stories, preference, rules(vocab_size=512)).pair
    raw = stories._tokenizer  # of transformers, which mlx-lm's wrapper wraps
    for reply, found in zip(
        (preference.chosen, preference.rejected), (pair.chosen, pair.rejected), strict=True
    ):
        before = raw.apply_chat_template(
            list(preference.prompt), add_generation_prompt=True, return_dict=False
        )
        whole = raw.apply_chat_template([*preference.prompt, *reply], return_dict=False)
        assert pair.prompt == tuple(before)
        assert found == tuple(whole[len(before) :])
    assert tokenize_pair(raw, preference, rules(vocab_size=512)).pair == pair


@pytest.mark.parametrize(
    ("setting", "has_template", "whole", "as_chat"),
    [
        ("auto", True, False, True),
        ("auto", True, True, False),
        ("auto", False, False, False),
        ("chat", True, True, True),
        ("text", True, False, False),
    ],
)
def test_when_strings_are_put_into_the_chat_template(setting, has_template, whole, as_chat):
    tokenizer = ByteTokenizer(CHAT if has_template else None)
    encoded = tokenize_pair(
        tokenizer, replace(strings(), implicit_prompt=whole), rules(chat_template=setting)
    )
    assert encoded.as_chat == as_chat
    assert encoded.pair.prompt == (ids(USER, "hi", EOS, ASSISTANT) if as_chat else ids("hi"))


def test_messages_without_a_template_raise_an_error(plain, chat):
    with pytest.raises(DataError, match=r"^pairs\.jsonl:7: messages need a chat template"):
        tokenize_pair(plain, messages(("user", "hi")), rules())
    with pytest.raises(DataError, match=r"^pairs\.jsonl:7: messages cannot be used as plain text"):
        tokenize_pair(chat(), messages(("user", "hi")), rules(chat_template="text"))


def test_a_template_that_changes_the_prompt_raises_an_error_with_the_token(chat):
    forgetful = chat("{% for m in messages[-1:] %}" + CHAT.partition("%}")[2])
    with pytest.raises(DataError) as error:
        tokenize_pair(forgetful, strings(), rules())
    assert str(error.value) == (
        "pairs.jsonl:7: the chat template changes the prompt once a reply follows (token 0: `<U>` "
        "became `<A>`), so the start of the reply is unknown; "
        "use a model whose template keeps the prompt"
    )


def test_a_template_that_changes_the_prompt_for_rejected_only_raises_an_error(chat):
    moody = chat("{% if 'no!' in messages[-1].content %}x{% endif %}" + CHAT)
    with pytest.raises(DataError, match=r"token 0: `<U>` became `x`"):
        tokenize_pair(moody, strings(), rules())


def test_an_error_of_the_template_is_quoted(chat):
    no_system = chat("{{ messages[0].tools.x }}")
    with pytest.raises(DataError, match=r"pairs\.jsonl:7: the model's chat template refuses the"):
        tokenize_pair(no_system, strings(), rules())


def test_a_newline_after_the_stop_token_is_removed(chat):
    chatml = chat(CHAT.replace("</s>", "</s>\n"))
    encoded = tokenize_pair(chatml, strings(), rules())
    assert encoded.pair.prompt == ids(USER, "hi", EOS, "\n", ASSISTANT)
    assert encoded.pair.chosen == ids("yo", EOS)
    assert encoded.stops_added == 0


def test_only_whitespace_is_cut_after_the_stop_token(chat):
    encoded = tokenize_pair(chat(CHAT.replace("</s>", "</s>x")), strings(), rules())
    assert encoded.pair.chosen == ids("yo", EOS, "x", EOS)
    assert encoded.stops_added == 2


def test_a_stop_token_is_added_if_the_template_writes_none(chat):
    encoded = tokenize_pair(chat(CHAT.replace("</s>", "")), strings(), rules())
    assert encoded.pair.prompt == ids(USER, "hi", ASSISTANT)
    assert (encoded.pair.chosen, encoded.stops_added) == (ids("yo", EOS), 2)


def test_every_stop_token_that_mlx_lm_knows_ends_a_reply(chat):
    tokenizer = chat(CHAT.replace("</s>", "!"))
    tokenizer.eos_token_ids = {EOS, ord("!")}
    encoded = tokenize_pair(tokenizer, strings(rejected="no"), rules())
    assert (encoded.pair.chosen, encoded.stops_added) == (ids("yo!"), 0)


def test_no_second_bos_token_is_added_to_a_template_that_writes_one():
    tokenizer = ByteTokenizer("<s>" + CHAT, adds_bos=True)
    pair = tokenize_pair(tokenizer, strings(), rules()).pair
    assert pair.prompt == ids(BOS, USER, "hi", EOS, ASSISTANT)


def test_a_token_across_the_boundary_of_a_template_goes_to_the_completion(chat):
    """The template ends with a newline and the reply begins with one: both merge into one id."""
    tokenizer = chat(CHAT.replace("m.role] }}", "m.role] }}\n").replace("<A>", "<A>\n"))
    encoded = tokenize_pair(tokenizer, strings(chosen="\nyo"), rules())
    assert encoded.pair.prompt == ids(USER, "\nhi", EOS, ASSISTANT)
    assert encoded.pair.chosen == ids(TWO_LINES, "yo", EOS)
    assert encoded.pair.rejected == ids("\nno!", EOS)  # the same boundary in both rows
    assert encoded.boundary_moved == 1


THINKING = (
    "{% for m in messages %}{{ mark[m.role] }}{% if m.role == 'assistant' and loop.last %}"
    "(){% endif %}{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<A>{% if not enable_thinking %}(){% endif %}{% endif %}"
)


@pytest.mark.parametrize(("thinking", "opened"), [(None, "()"), (False, "()"), (True, "")])
def test_thinking_is_off_by_default(chat, thinking, opened):
    """As Qwen3 does: an empty thought stands before the last reply, and opens it when off."""
    setting = rules(thinking=thinking)
    check_token_rules(chat(THINKING), setting)
    pair = tokenize_pair(chat(THINKING), strings(), setting).pair
    assert pair.prompt == ids(USER, "hi", EOS, ASSISTANT, opened)
    assert pair.prompt + pair.chosen == ids(USER, "hi", EOS, ASSISTANT, "()yo", EOS)


@pytest.mark.parametrize("thinking", [True, False])
def test_thinking_without_effect_raises_an_error(plain, chat, thinking):
    for tokenizer in (plain, chat()):
        with pytest.raises(ConfigError, match="`thinking` has no effect"):
            check_token_rules(tokenizer, rules(thinking=thinking))


def test_chat_without_a_template_raises_an_error(plain):
    with pytest.raises(ConfigError, match="`chat_template` is chat, but the model has no"):
        check_token_rules(plain, rules(chat_template="chat"))


def test_a_tokenizer_without_a_stop_token_raises_an_error(plain):
    plain.eos_token_id = None
    with pytest.raises(ModelError, match="defines no stop token"):
        check_token_rules(plain, rules())


def test_plain_text_has_one_bos_and_one_stop_token(plain):
    for prompt, chosen in (("hi ", "yo"), ("<s>hi ", "yo</s>"), ("hi ", "yo</s>\n")):
        pair = tokenize_pair(plain, strings(prompt, chosen), rules()).pair
        assert pair.prompt == ids(BOS, "hi ")
        assert pair.chosen == ids("yo", EOS)


def test_only_added_stop_tokens_are_counted(plain):
    assert tokenize_pair(plain, strings(chosen="yo</s>"), rules()).stops_added == 1


def test_a_token_across_the_boundary_of_plain_text_goes_to_the_completion(plain):
    encoded = tokenize_pair(plain, strings("hi\n", "yo", "\nno"), rules())
    assert encoded.pair.prompt == ids(BOS, "hi")
    assert encoded.pair.chosen == ids("\nyo", EOS)
    assert encoded.pair.rejected == ids(TWO_LINES, "no", EOS)
    assert encoded.boundary_moved == 1


def test_without_a_prompt_the_bos_token_is_the_prompt(plain):
    assert tokenize_pair(plain, strings(prompt=""), rules()).pair.prompt == (BOS,)
    silent = ByteTokenizer()  # knows a BOS but does not write it
    assert tokenize_pair(silent, strings(prompt=""), rules()).pair.prompt == (BOS,)


def test_without_prompt_and_bos_token_a_pair_is_bad(chat):
    nothing = ByteTokenizer()
    nothing.bos_token = nothing.bos_token_id = None
    for tokenizer in (nothing, chat()):
        with pytest.raises(BadPairError) as error:
            tokenize_pair(tokenizer, strings(prompt=""), rules())
        assert error.value.reason == EMPTY_PROMPT


def test_a_real_tokenizer_keeps_the_text(stories):
    """Its one token <s> begins and ends texts: the prompt has it in front, completions behind."""
    preference = strings("Once upon a time", " there was a cat", " a dog ran.")
    encoded = tokenize_pair(stories, preference, rules(vocab_size=512, chat_template="text"))
    pair = encoded.pair
    for text, completion in ((" there was a cat", pair.chosen), (" a dog ran.", pair.rejected)):
        row = pair.prompt + completion
        assert [i for i, token in enumerate(row) if token == 1] == [0, len(row) - 1]
        assert stories.decode(row[1:-1]) == "Once upon a time" + text
        assert list(row[:-1]) == stories.encode("Once upon a time" + text)
    assert stories.decode(pair.prompt[1:]) == "Once upon a time"


def test_completions_with_the_same_tokens_are_a_bad_pair(chat):
    trims = chat(CHAT.replace("m.content", "m.content | trim"))
    with pytest.raises(BadPairError) as error:
        tokenize_pair(trims, strings(chosen="yo", rejected=" yo\n"), rules())
    assert error.value.reason == SAME_TOKENS


@pytest.mark.parametrize("stop", ["</s>", ""])
def test_a_completion_of_a_stop_token_only_is_a_bad_pair(chat, stop):
    template = CHAT.replace("m.content", "m.content | replace('no!', '')")
    drops = chat(template.replace("</s>", stop))
    with pytest.raises(BadPairError) as error:
        tokenize_pair(drops, strings(), rules())
    assert error.value.reason == EMPTY_COMPLETION


@pytest.mark.parametrize("text", ["prompt", "chosen", "rejected"])
def test_an_id_outside_the_vocabulary_raises_an_error_in_any_part(plain, text):
    given = {"prompt": "hi", "chosen": "yo", "rejected": "no"}
    given[text] += "~"
    plain.eos_token_id, plain.bos_token_id, plain.adds_bos = ord("!"), ord("!"), False
    assert tokenize_pair(plain, strings(**given), rules(vocab_size=ord("~") + 1))
    with pytest.raises(DataError) as error:
        tokenize_pair(plain, strings(**given), rules(vocab_size=ord("~")))
    assert str(error.value) == (
        "pairs.jsonl:7: token 126 (`~`) is outside the model's vocabulary of 126; "
        "the tokenizer does not belong to this model"
    )


def test_a_pair_that_is_too_long_is_truncated_and_reported(chat):
    encoded = tokenize_pair(chat(), strings(), rules(max_length=8))
    assert encoded.truncated
    assert encoded.pair.chosen == ids("yo", EOS)
    assert encoded.pair.rejected == ids("no!")


def test_cuts_are_counted_and_a_cut_completion_has_no_stop_token(chat):
    turns = messages(("user", "one"), ("assistant", "two"), ("user", "six"), chosen="yo")
    whole = tokenize_pair(chat(), turns, rules()).pair
    assert len(whole) == 16 + 4
    cut = tokenize_pair(chat(), turns, rules(max_length=18))
    assert (cut.prompt_cut, cut.completions_cut) == (False, 2)
    assert EOS not in cut.pair.chosen + cut.pair.rejected
    shortened = tokenize_pair(chat(), turns, rules(max_length=18, truncation="keep_end"))
    assert (shortened.prompt_cut, shortened.completions_cut) == (True, 0)
    # The first question and its answer are gone, not some of their tokens.
    assert shortened.pair.prompt == ids(USER, "six", EOS, ASSISTANT)
    assert shortened.pair.chosen == whole.chosen


def test_keep_end_keeps_the_bos_token_of_plain_text(plain):
    cut = tokenize_pair(
        plain, strings("a long prompt", "yo", "no!"), rules(max_length=8, truncation="keep_end")
    )
    assert cut.pair.prompt == ids(BOS, "mpt"[-3:])
    assert (cut.prompt_cut, cut.completions_cut) == (True, 0)


def test_a_system_turn_needs_a_template(plain, chat):
    with pytest.raises(ConfigError, match="`system` needs a chat template"):
        tokenize_pair(plain, strings(), rules(system="be kind"))
    encoded = tokenize_pair(chat(), strings(), rules(system="be kind"))
    assert encoded.with_system
    assert encoded.pair.prompt == ids(SYSTEM, "be kind", EOS, USER, "hi", EOS, ASSISTANT)


def test_keep_end_cuts_at_any_token_if_turn_starts_are_unknown(chat):
    turns = messages(("user", "one"), ("assistant", "two"), ("user", "six"), chosen="yo")
    moody = chat("{% if messages | length == 2 %}x{% endif %}" + CHAT)
    setting = rules(max_length=18, truncation="keep_end")
    shortened = tokenize_pair(moody, turns, setting).pair.prompt
    assert shortened == tokenize_pair(chat(), turns, rules()).pair.prompt[-14:]
    assert len(shortened) == 18 - len(b"no!") - 1
