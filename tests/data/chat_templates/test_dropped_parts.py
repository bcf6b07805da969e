"""Parts of a conversation that the chat template leaves out are faults or findings."""

import pytest

from mlx_dpo.data.report import PairsReport
from mlx_dpo.data.tokenization.formatting import TokenRules
from mlx_dpo.data.tokenization.tokenize import tokenize_pair
from mlx_dpo.errors import NOT_WRITTEN, BadPairError
from mlx_dpo.types import PreferenceExample
from tests.data.chat_templates import tool_templates as templates
from tests.data.chat_templates.tool_templates import with_template
from tests.data.template_families import TEMPLATES, byte_level

USER = {"role": "user", "content": "Weather in Paris?"}
FUNCTION = {"name": "get_weather", "arguments": {"city": "Paris"}}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "abcdef123", "type": "function", "function": FUNCTION}],
}
RESULT = {"role": "tool", "content": "Rain."}
TOOLS = {"tools": [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]}
NO_TOOL_TURN = templates.QWEN.replace(
    "for message in messages", "for message in messages if message.role != 'tool'"
)
NO_SYSTEM = templates.SILENT.replace(
    "for message in messages", "for message in messages if message.role != 'system'"
)
NAME_ONLY = templates.QWEN.replace("tool_call.arguments | tojson", "'{}'")
FIRST_CALL = templates.QWEN.replace("message.tool_calls or []", "(message.tool_calls or [])[:1]")
NO_THOUGHT = templates.SILENT.replace("message.content", "message.content.split('</think>')[-1]")
REASONING = templates.SILENT.replace(
    "message.content", "(message.reasoning_content or '') + '</think>' + message.content"
)


def answer(text, **fields):
    return {"role": "assistant", "content": text, **fields}


def tokenized(template, *prompt, chosen, rejected=None, thinking=None, **kwargs):
    tokenizer = with_template(template) if isinstance(template, str) else template
    rejected = (answer("No idea."),) if rejected is None else rejected
    pair = PreferenceExample(prompt, chosen, rejected, "pairs.jsonl:3", kwargs)
    return tokenize_pair(tokenizer, pair, TokenRules(vocab_size=1000, thinking=thinking))


@pytest.mark.parametrize(
    ("template", "turns", "found"),
    [
        (templates.SILENT, [USER, CALL], "the tool call of `chosen[0]`: name of `get_weather`"),
        (templates.SILENT, [USER, CALL, RESULT, answer("Rain.")], "the tool call of `prompt[1]`"),
        (NAME_ONLY, [USER, CALL], "arguments of `get_weather`"),
        (NO_TOOL_TURN, [USER, CALL, RESULT, answer("Rain.")], "the content of `prompt[2]`"),
        (NO_SYSTEM, [{"role": "system", "content": "Be kind."}, USER, answer("Rain.")],
         "the content of `prompt[0]`"),
        (templates.LLAMA_3, [USER, CALL | {"content": "I look."}], "the content of `chosen[0]`"),
        (FIRST_CALL, [USER, CALL | {"tool_calls": CALL["tool_calls"] * 2}],
         "the tool call of `chosen[0]`: name of `get_weather`"),
        (templates.SILENT, [USER, answer("Rain.", reasoning_content="I know.")],
         "the reasoning of `chosen[0]`"),
        (templates.SILENT, [USER, answer("Rain.", thinking="I know.")],
         "the reasoning of `chosen[0]`"),
        (NO_THOUGHT, [USER, answer("<think>\nI know.\n</think>\n\nRain.")],
         "the reasoning of `chosen[0]`: before `</think>`"),
    ],
)  # fmt: skip
def test_content_that_leaves_no_trace_is_a_fault(template, turns, found):
    *prompt, chosen = turns
    with pytest.raises(BadPairError) as bad:
        tokenized(template, *prompt, chosen=(chosen,))
    assert found in str(bad.value)
    assert bad.value.reason == NOT_WRITTEN


def test_the_rejected_completion_is_looked_at_too():
    with pytest.raises(BadPairError, match=r"the tool call of `rejected\[0\]`"):
        tokenized(templates.SILENT, USER, chosen=(answer("Rain."),), rejected=(CALL,))


def test_a_finding_does_not_depend_on_the_rows_before():
    """The row without a call must not stand for the row with one, nor history for an answer."""
    tokenizer = with_template(templates.SILENT)
    for _ in range(2):
        assert not tokenized(tokenizer, USER, chosen=(answer("Rain."),)).unwritten
        with pytest.raises(BadPairError, match="tool call"):
            tokenized(tokenizer, USER, chosen=(CALL,))


@pytest.mark.parametrize(
    ("template", "prompt", "kwargs", "names"),
    [
        (templates.SILENT, [USER], TOOLS, {"tools"}),
        (templates.QWEN, [USER], TOOLS, set()),
        (templates.SILENT, [USER | {"name": "Ann"}], {}, {"name"}),
        (templates.QWEN, [USER, CALL, RESULT | {"name": "get_weather", "tool_call_id": "abc"}],
         {}, set()),
        (templates.SILENT, [USER, answer("Hi.", reasoning_content="Hm."), USER], {}, {"reasoning"}),
        (REASONING, [USER, answer("Hi.", reasoning_content="Hm."), USER], {}, set()),
        (NO_THOUGHT, [USER, answer("<think>Hm.</think>Hi."), USER], {}, {"reasoning"}),
    ],
)  # fmt: skip
def test_a_field_without_a_trace_is_counted(template, prompt, kwargs, names):
    assert tokenized(template, *prompt, chosen=(answer("Rain."),), **kwargs).unwritten == names


def test_qwen_3_leaves_out_earlier_thoughts_and_trains_on_that_of_the_answer():
    tokenizer, thought = byte_level("qwen-3"), "<think>\nWhy?\n</think>\n\n"
    pair = tokenized(
        tokenizer, USER, answer(f"{thought}Hi."), USER, chosen=(answer(f"{thought}So."),),
        thinking=True,
    )  # fmt: skip
    assert pair.unwritten == {"reasoning"}
    assert tokenizer.decode(pair.pair.chosen).startswith("<think>\nWhy?")


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - {"deepseek-r1"}))
def test_ordinary_conversations_leave_their_traces(name):
    system = () if name == "gemma" else ({"role": "system", "content": "Be kind."},)
    prompt = (*system, USER, answer("Where?"), USER)
    assert not tokenized(byte_level(name), *prompt, chosen=(answer("Rain."),)).unwritten


def test_known_templates_are_not_rendered_again():
    """Two rows of the same kind cost one set of further renderings."""
    tokenizer, calls = with_template(templates.QWEN), []
    apply = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda *args, **more: calls.append(1) or apply(*args, **more)
    tokenized(tokenizer, USER, chosen=(CALL,))
    calls.clear()
    tokenized(tokenizer, USER | {"content": "And in Rome?"}, chosen=(CALL,))
    assert len(calls) == 3  # the prompt and the two completions


def test_the_report_counts_pairs_with_unwritten_fields():
    report = PairsReport("pairs.jsonl", 1024)
    for _ in range(2):
        pair = tokenized(templates.SILENT, USER, chosen=(answer("Rain."),), **TOOLS)
        report.keep(pair, was_text=False)
    assert "2 pairs with `tools` that the model's chat template drops" in report.lines()
