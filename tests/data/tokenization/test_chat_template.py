"""Chat templates of model families: where the completion begins, and which tokens are scored."""

import pytest

from mlx_dpo.data.tokenization.formatting import TokenRules
from mlx_dpo.data.tokenization.tokenize import check_token_rules, tokenize_pair
from mlx_dpo.errors import TEMPLATE_ERROR, BadPairError, ConfigError, DataError, ModelError
from mlx_dpo.types import PreferenceExample
from tests.data.template_families import TEMPLATES, byte_level, metaspace

PREFIXED = sorted(TEMPLATES.keys() - {"deepseek-r1"})
NO_SYSTEM = {"gemma"}


def turns(*texts, system=None):
    found = [{"role": "system", "content": system}] if system else []
    for number, text in enumerate(texts):
        found.append({"role": ("user", "assistant")[number % 2], "content": text})
    return tuple(found)


def pair_of(tokenizer, prompt, chosen="yes it is", rejected="no", **rules):
    replies = (({"role": "assistant", "content": text},) for text in (chosen, rejected))
    preference = PreferenceExample(prompt, *replies, location="pairs.jsonl:7")
    return tokenize_pair(tokenizer, preference, TokenRules(vocab_size=1000, **rules))


@pytest.mark.parametrize("make", [byte_level, metaspace])
@pytest.mark.parametrize("name", PREFIXED)
@pytest.mark.parametrize("earlier", [(), ("hello", "hi there")])
def test_prompt_and_completion_are_the_conversation_split_at_the_completion(name, make, earlier):
    """The scored tokens are the completion and its stop token only."""
    tokenizer = make(name)
    prompt = turns(*earlier, "is it?")
    encoded = pair_of(tokenizer, prompt)
    pair, stop = encoded.pair, tokenizer.eos_token_id
    expected = tokenizer.apply_chat_template(
        list(prompt), add_generation_prompt=True, return_dict=False, enable_thinking=False
    )
    assert list(pair.prompt) == expected
    for completion, text in ((pair.chosen, "yes it is"), (pair.rejected, "no")):
        assert completion[-1] == stop
        assert stop not in completion[:-1]
        assert tokenizer.decode(completion[:-1]).strip() == text
        whole = tokenizer.apply_chat_template(
            [*prompt, {"role": "assistant", "content": text}], return_dict=False
        )
        assert [*pair.prompt, *completion] == whole[: len(pair.prompt) + len(completion)]
        assert not tokenizer.decode(whole[len(pair.prompt) + len(completion) :]).strip()
    assert encoded.stops_added == 0
    assert encoded.boundary_moved == 0


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_no_template_gets_a_second_bos_token(name):
    tokenizer = byte_level(name)
    if (
        name == "deepseek-r1"
        or tokenizer.bos_token is None
        or tokenizer.bos_token == "<|im_start|>"
    ):
        return
    prompt = pair_of(tokenizer, turns("is it?")).pair.prompt
    begins = "{{- bos_token" in tokenizer.chat_template
    assert prompt.count(tokenizer.bos_token_id) == begins
    assert (prompt[0] == tokenizer.bos_token_id) == begins


@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_a_template_that_opens_a_thought_only_in_the_generation_prompt_raises_an_error(make):
    """DeepSeek-R1 drops thoughts from a conversation, so its prompt is not a prefix of it."""
    with pytest.raises(DataError, match="the chat template changes the prompt once a reply"):
        pair_of(make("deepseek-r1"), turns("is it?"))


@pytest.mark.parametrize("name", PREFIXED)
def test_a_system_turn_is_written_or_the_templates_error_is_raised(name):
    tokenizer = byte_level(name)
    prompt = turns("is it?", system="be kind")
    if name not in NO_SYSTEM:
        assert "be kind" in tokenizer.decode(pair_of(tokenizer, prompt).pair.prompt)
        return
    with pytest.raises(BadPairError, match="System role not supported") as error:
        pair_of(tokenizer, prompt)
    assert error.value.reason == TEMPLATE_ERROR


def test_the_system_turn_of_the_settings_is_added_if_there_is_none():
    tokenizer = byte_level("chatml")
    expected = pair_of(tokenizer, turns("is it?"), system="be kind")
    assert expected.with_system
    assert expected.pair == pair_of(tokenizer, turns("is it?", system="be kind")).pair
    own = pair_of(tokenizer, turns("is it?", system="be short"), system="be kind")
    assert not own.with_system
    assert own.pair == pair_of(tokenizer, turns("is it?", system="be short")).pair
    same = pair_of(tokenizer, turns("is it?", system="be kind"), system="be kind")
    assert (same.with_system, same.pair) == (True, expected.pair)


@pytest.mark.parametrize(
    ("thinking", "answer", "scored"),
    [
        (None, "so", "so"),
        (False, "so", "so"),
        (True, "so", "<think>\n\n</think>\n\nso"),
        (True, "<think>\nwhy\n</think>\n\nso", "<think>\nwhy\n</think>\n\nso"),
    ],
)
def test_a_thinking_template_scores_what_the_model_generates(thinking, answer, scored):
    tokenizer = byte_level("qwen-3")
    pair = pair_of(tokenizer, turns("is it?"), answer, "no", thinking=thinking).pair
    assert tokenizer.decode(pair.chosen[:-1]) == scored
    opened = "" if thinking else "<think>\n\n</think>\n\n"
    assert tokenizer.decode(pair.prompt).endswith("<|im_start|>assistant\n" + opened)


def test_a_thought_in_a_completion_raises_an_error_while_thinking_is_off():
    """The prompt has an empty thought, and the conversation another one."""
    with pytest.raises(DataError, match="the chat template changes the prompt"):
        pair_of(byte_level("qwen-3"), turns("is it?"), "<think>\nwhy\n</think>\n\nso")


@pytest.mark.parametrize(
    ("name", "thinking", "answer", "remedy"),
    [
        (
            "qwen-3",
            None,
            "<think>\nwhy\n</think>\n\nso",
            "contain the model's thoughts: add --thinking",
        ),
        ("qwen-3", False, "<think>why</think>so", "contain the model's thoughts: add --thinking"),
        ("deepseek-r1", None, "so", "use a model whose template keeps the prompt"),
    ],
)
def test_the_remedy_for_a_changed_prompt_is_named(name, thinking, answer, remedy):
    with pytest.raises(DataError, match=f"the start of the reply is unknown; .*{remedy}$"):
        pair_of(byte_level(name), turns("is it?"), answer, "no", thinking=thinking)
    if "--thinking" in remedy:
        pair_of(byte_level(name), turns("is it?"), answer, "no", thinking=True)


def test_thinking_is_the_remedy_where_a_template_leaves_out_the_reasoning_without_it():
    tokenizer = byte_level.__wrapped__("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message.content",
        "((message.reasoning_content or '') if enable_thinking else '') + message.content",
    )
    chosen = ({"role": "assistant", "content": "yes", "reasoning_content": "why"},)
    rejected = ({"role": "assistant", "content": "no"},)
    pair = PreferenceExample(turns("is it?"), chosen, rejected, "pairs.jsonl:7")
    with pytest.raises(BadPairError, match=r"the reasoning of `chosen\[0\]`.*add --thinking"):
        tokenize_pair(tokenizer, pair, TokenRules(vocab_size=1000))
    scored = tokenize_pair(tokenizer, pair, TokenRules(vocab_size=1000, thinking=True)).pair.chosen
    assert tokenizer.decode(scored[:-1]) == "whyyes"


def test_a_template_that_cannot_be_used_stops_at_the_first_row():
    """No row of the data set would get any further, so it is no fault of a row."""
    tokenizer = byte_level.__wrapped__("chatml")
    for template, problem in (
        ("{{ 'a' * 10 ** 10 }}", "builds a text or list"),
        ("{% for x in %}", "cannot be compiled"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(ModelError, match=f"pairs.jsonl:7: .*{problem}.*; use a model with"):
            pair_of(tokenizer, turns("is it?"))
        with pytest.raises(ModelError, match=f"`thinking`: .*{problem}"):
            check_token_rules(tokenizer, TokenRules(thinking=True))


@pytest.mark.parametrize(
    "template", ["", "{# nothing #}", "{% if false %}{{ messages }}{% endif %}"]
)
def test_a_template_that_writes_nothing_is_a_fault(template):
    tokenizer = byte_level.__wrapped__("chatml")
    tokenizer.chat_template = template
    with pytest.raises(BadPairError, match=r"the content of `prompt\[0\]`"):
        pair_of(tokenizer, turns("is it?"))


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - {"qwen-3"}))
def test_thinking_raises_an_error_for_a_template_without_it(name):
    with pytest.raises(ConfigError, match="`thinking` has no effect"):
        check_token_rules(byte_level(name), TokenRules(vocab_size=1000, thinking=True))


@pytest.mark.parametrize("name", PREFIXED)
def test_a_prompt_that_ends_with_an_assistant_turn_is_continued(name):
    """The tokens are those of the whole assistant turn; only the boundary differs."""
    tokenizer = byte_level(name)
    whole = pair_of(tokenizer, turns("is it?"), "well, yes", "well, no").pair
    begun = pair_of(tokenizer, turns("is it?", "well,"), " yes", " no").pair
    for one, other in ((whole.chosen, begun.chosen), (whole.rejected, begun.rejected)):
        assert whole.prompt + one == begun.prompt + other
    assert tokenizer.decode(begun.chosen[:-1]) == " yes"
    assert tokenizer.decode(begun.rejected[:-1]) == " no"
    assert tokenizer.decode(begun.prompt).endswith("well,")


def test_tools_and_arguments_of_a_row_reach_the_template():
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
    tokenizer = byte_level("qwen-2.5")
    prompt = turns("is it?")
    answers = (
        ({"role": "assistant", "content": "", "tool_calls": [call]},),
        ({"role": "assistant", "content": "no"},),
    )
    given = {"tools": [tool]}
    pair = tokenize_pair(
        tokenizer, PreferenceExample(prompt, *answers, "x:1", given), TokenRules(vocab_size=1000)
    ).pair
    expected = tokenizer.apply_chat_template(
        list(prompt), tools=[tool], add_generation_prompt=True, return_dict=False
    )
    assert list(pair.prompt) == expected
    assert '"name": "look", "arguments": {"at": "it"}' in tokenizer.decode(pair.chosen)
    assert pair.prompt != tokenize_pair(
        tokenizer, PreferenceExample(prompt, *answers, "x:1"), TokenRules(vocab_size=1000)
    ).pair.prompt  # fmt: skip


def test_a_rows_own_enable_thinking_counts_unless_the_setting_contradicts():
    tokenizer = byte_level("qwen-3")
    answers = (({"role": "assistant", "content": text},) for text in ("yes", "no"))
    row = PreferenceExample(
        turns("is it?"), *answers, location="x:1", template_kwargs={"enable_thinking": True}
    )
    free, on = (
        tokenize_pair(tokenizer, row, TokenRules(vocab_size=1000, thinking=thinking)).pair
        for thinking in (None, True)
    )
    assert free == on
    with pytest.raises(DataError, match="enable_thinking True, which contradicts --thinking"):
        tokenize_pair(tokenizer, row, TokenRules(vocab_size=1000, thinking=False))
