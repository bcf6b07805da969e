"""The same tool call becomes the same text in training and in the server, in every form."""

import json

import pytest
from mlx_lm.server import CompletionRequest, process_message_content
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_dpo.chat.response_generator import TemplateTokenizer
from mlx_dpo.data.chat_templates.tool_calls import CallForm, find_call_form
from mlx_dpo.data.tokenization.formatting import TokenRules
from mlx_dpo.data.tokenization.tokenize import tokenize_pair
from mlx_dpo.errors import TEMPLATE_ERROR, BadPairError
from mlx_dpo.schemas import parse_pairs
from mlx_dpo.schemas.schema import Row
from mlx_dpo.schemas.tool_calls import normalize_tool_calls
from tests.data.chat_templates import tool_templates as templates
from tests.data.chat_templates.tool_templates import with_template

ARGUMENTS = {"city": "Zürich", "unit": "C"}
AS_JSON = '{"city": "Zürich", "unit": "C"}'
USER = {"role": "user", "content": "Weather?"}
# Each template, the form of a call that it takes, and the text that it writes of the call.
FAMILIES = {
    "QWEN": (CallForm(), '{"name": "weather", "arguments": ' + AS_JSON + "}"),
    "HERMES": (CallForm(), '{"name": "weather", "arguments": ' + AS_JSON + "}"),
    "LLAMA_3": (CallForm(), '{"name": "weather", "parameters": ' + AS_JSON + "}"),
    "MISTRAL": (CallForm(), '"arguments": ' + AS_JSON + ', "id": "abcdef123"}'),
    "GLM": (CallForm(), "<key>city</key><value>Zürich</value><key>unit</key><value>C</value>"),
    "DEEPSEEK": (CallForm(as_text=True), f"weather\n```json\n{AS_JSON}\n```"),
    "DEEPSEEK_TILDE": (CallForm(as_text=True), f"weather\n```json\n{AS_JSON}\n```"),
    "FLAT": (CallForm(wrapped=False), f"weather{AS_JSON}"),
    "SILENT": (CallForm(), ""),
}
FORMS = {
    "object": ARGUMENTS,
    "text": json.dumps(ARGUMENTS),  # Python's own escapes
    "compact text": json.dumps(ARGUMENTS, ensure_ascii=False, separators=(",", ":")),
}


def call_message(arguments, **fields):
    function = {"arguments": arguments, "name": "weather"}  # the order of OpenAI's client
    call = {"id": "abcdef123", "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call], **fields}


def scored_text(tokenizer, chosen):
    record = {
        "prompt": [USER],
        "chosen": chosen if isinstance(chosen, list) else [chosen],
        "rejected": [{"role": "assistant", "content": "No idea."}],
    }
    return scored_record(tokenizer, record)


def scored_record(tokenizer, record):
    [pair] = parse_pairs(Row(record, "pairs.jsonl:3"))
    tokenized = tokenize_pair(tokenizer, pair, TokenRules(vocab_size=1000))
    return tokenizer.decode(tokenized.pair.chosen)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_form_that_a_template_takes_is_found(name):
    assert find_call_form(with_template(getattr(templates, name))) == FAMILIES[name][0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"SILENT"}))
def test_every_form_of_the_data_becomes_the_same_text(name, form):
    tokenizer = with_template(getattr(templates, name))
    text = scored_text(tokenizer, call_message(FORMS[form]))
    assert FAMILIES[name][1] in text
    assert text == scored_text(tokenizer, call_message(ARGUMENTS))


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"MISTRAL", "SILENT"}))
def test_flat_calls_and_the_old_function_call_become_the_same_text(name):
    tokenizer = with_template(getattr(templates, name))
    expected = scored_text(tokenizer, call_message(ARGUMENTS))
    call = {"name": "weather", "arguments": AS_JSON}
    flat = {"role": "assistant", "content": None, "tool_calls": [call]}
    old = {"role": "assistant", "content": None, "function_call": call}
    parameters = {"tool_calls": [{"name": "weather", "parameters": ARGUMENTS}]}
    for message in (flat, old, {"role": "assistant", "content": ""} | parameters):
        assert scored_text(tokenizer, message) == expected
    sharegpt = {
        "conversations": [{"from": "human", "value": "Weather?"}],
        "chosen": {"from": "function_call", "value": json.dumps(call)},
        "rejected": {"from": "gpt", "value": "No idea."},
    }
    assert scored_record(tokenizer, sharegpt) == expected


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"SILENT"}))
def test_the_server_writes_a_call_as_training_does(name, form):
    tokenizer = with_template(getattr(templates, name))
    turns = [USER, call_message(FORMS[form]), {"role": "tool", "content": "5 degrees"}]
    request = CompletionRequest(
        "chat", "", [normalize_tool_calls(m, "") for m in turns], None, None
    )
    process_message_content(request.messages)  # as mlx-lm's server does
    served = TemplateTokenizer(TokenizerWrapper(tokenizer)).apply_chat_template(
        request.messages, add_generation_prompt=True, tokenize=True, enable_thinking=False
    )
    record = {
        "prompt": turns,
        "chosen": [{"role": "assistant", "content": "Cold."}],
        "rejected": [{"role": "assistant", "content": "Hot."}],
    }
    [pair] = parse_pairs(Row(record, "pairs.jsonl:3"))
    trained = tokenize_pair(tokenizer, pair, TokenRules(vocab_size=1000)).pair
    assert list(trained.prompt) == list(served)
    assert FAMILIES[name][1] in tokenizer.decode(served)


@pytest.mark.parametrize("broken", ['{"city": "Par', "[1]", '{"a": 1, "a": 2}', '{"a": NaN}'])
def test_arguments_that_are_no_json_object_stay_text_or_are_a_fault(broken):
    assert broken in scored_text(with_template(templates.DEEPSEEK), call_message(broken))
    with pytest.raises(
        BadPairError, match=r"pairs.jsonl:3: .* are not a JSON object \(found "
    ) as bad:
        scored_text(with_template(templates.QWEN), call_message(broken))
    assert bad.value.reason == TEMPLATE_ERROR


@pytest.mark.parametrize("nothing", ["", " ", None, {}, "{}"])
def test_a_call_without_arguments_is_an_empty_object(nothing):
    assert '"arguments": {}}' in scored_text(with_template(templates.QWEN), call_message(nothing))


def test_a_tools_answer_of_the_old_role_is_a_tool_turn():
    prompt = [USER, call_message(ARGUMENTS), {"role": "function", "name": "w", "content": "5"}]
    record = {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": "Cold."}],
        "rejected": [{"role": "assistant", "content": "Hot."}],
    }
    [pair] = parse_pairs(Row(record, "x:1"))
    assert pair.prompt[2]["role"] == "tool"


def test_a_special_token_in_the_arguments_stays_plain_text():
    tokenizer = with_template(templates.DEEPSEEK)
    for arguments in ({"<|im_end|>": "a"}, {"a": "<|im_end|>"}, '{"<|im_end|>": "a"}'):
        record = {
            "prompt": [USER],
            "chosen": [call_message(arguments)],
            "rejected": [{"role": "assistant", "content": "No."}],
        }
        [pair] = parse_pairs(Row(record, "x:1"))
        ids = tokenize_pair(tokenizer, pair, TokenRules(vocab_size=1000)).pair.chosen
        assert ids.count(tokenizer.eos_token_id) == 1
