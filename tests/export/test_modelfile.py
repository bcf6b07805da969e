"""The Modelfile for Ollama says the same as the chat template."""

import re

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import AutoTokenizer

from mlx_dpo.errors import ModelError
from mlx_dpo.export.modelfile import MessageMarks, make_modelfile, translate_chat_template
from tests.checkpoints import make_checkpoint

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    + CHATML
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|h|>{{ m.role }}<|/h|>\n\n{{ m.content | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|h|>assistant<|/h|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% set first = messages[0].content + '\n\n' %}{% set loop_messages = messages[1:] %}"
    "{% else %}{% set first = '' %}"
    "{% set loop_messages = messages %}{% endif %}{% for m in loop_messages %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ first if loop.first else '' }}"
    "{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
INSTRUCT = (  # no system message, and an end token behind answers alone
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('no system') }}{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
NO_THINKING = CHATML.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tokenizer"))


def tokenizer_with(folder, template):
    inner = AutoTokenizer.from_pretrained(str(folder))
    inner.chat_template = template
    inner.bos_token = "<s>"
    return TokenizerWrapper(inner)


def translate(folder, template):
    return translate_chat_template(tokenizer_with(folder, template), "m", thinking=False)


def run_go_template(template, messages):
    """Return what Go's text/template makes of the few constructs that are written."""
    start, _, rest = template.partition("{{ range $i, $m := .Messages }}")
    body, _, answer = rest.rpartition("{{ end }}")
    text = start
    for index, message in enumerate(messages):
        chosen = None
        for case in re.split(r"\{\{ (?:else )?if eq \$m\.Role ", body)[1:]:
            role, _, content = case.partition(" }}")
            if role.strip('"') == message["role"]:
                chosen = content.removesuffix("{{ end }}") if body.endswith(case) else content
        second = re.compile(r"\{\{ if or \(ne \$i 1\)[^}]*\}\}(.*?)\{\{ end \}\}", re.DOTALL)
        is_joined = index == 1 and messages[0]["role"] == "system"
        chosen = second.sub("" if is_joined else r"\1", chosen)
        text += chosen.replace("{{ $m.Content }}", message["content"])
    return text + answer


@pytest.mark.parametrize(
    "template", [CHATML, DEFAULT_SYSTEM, HEADERS, GEMMA, INSTRUCT, NO_THINKING]
)
def test_ollama_writes_the_text_that_the_chat_template_writes(folder, template):
    """Conversations with other roles, texts and lengths than those it was derived from."""
    tokenizer = tokenizer_with(folder, template)
    marks = translate_chat_template(tokenizer, "m", thinking=False)
    roles = ["user", "assistant"] * 3 + ["user"]
    talk = [{"role": role, "content": f"{n} says «{role}»."} for n, role in enumerate(roles)]
    talks = [talk]
    if "system" in marks.before:
        talks.append([{"role": "system", "content": "Be brief."}, *talk])
    for messages in talks:
        expected = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        shown = messages
        if marks.default_system and messages[0]["role"] != "system":
            shown = [{"role": "system", "content": marks.default_system}, *messages]
        written = run_go_template(marks.go_template(), shown)
        assert written == expected.removeprefix("<s>")


def test_the_marks_of_a_template(folder):
    marks = translate(folder, HEADERS)
    assert marks.start == "" and marks.default_system is None and not marks.joins_system
    before = "<|h|>{}<|/h|>\n\n"
    text = marks.before["system"] + "S" + marks.after["system"] + marks.before["user"] + "U"
    assert text == before.format("system") + "S<|eot|>" + before.format("user") + "U"
    assert marks.after["user"] + marks.answer == "<|eot|>" + before.format("assistant")
    assert translate(folder, DEFAULT_SYSTEM).default_system == "You help."
    assert translate(folder, GEMMA).joins_system
    assert "system" not in translate(folder, INSTRUCT).before


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("{{ m.content }}", "{{ m.content | upper }}"),
        CHATML.replace("{{ m.role }}", "{{ m.role }} {{ loop.index }}"),  # by position
        CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else '' }}"),
        "{{ messages[-1].content }}",  # drops all but the last
        CHATML.replace("<|im_end|>", "{{ '{{' }}"),  # Go's syntax
        CHATML.replace("<|im_end|>", '"""'),
    ],
)
def test_a_template_that_ollama_cannot_have_is_refused(folder, template):
    with pytest.raises(ModelError, match=r"^m: its chat template does more than put fixed text"):
        translate(folder, template)


def test_the_lines_of_a_modelfile():
    marks = MessageMarks(
        {"user": "<u>", "assistant": "<a>", "system": "<s>"},
        {"user": "", "assistant": "<e>", "system": ""},
        "",
        "<a>",
    )
    assert make_modelfile("./model.gguf", marks, system="Be kind.", stop=["<e>"]).splitlines() == [
        "FROM ./model.gguf",
        'TEMPLATE """{{ range $i, $m := .Messages }}{{ if eq $m.Role "user" }}<u>{{ $m.Content }}'
        '{{ else if eq $m.Role "assistant" }}<a>{{ $m.Content }}<e>'
        '{{ else if eq $m.Role "system" }}<s>{{ $m.Content }}{{ end }}{{ end }}<a>"""',
        'SYSTEM """Be kind."""',
        'PARAMETER stop "<e>"',
    ]
    without = MessageMarks({"user": ""}, {"user": ""}, "", "")
    with pytest.raises(ModelError, match="has no place for it"):
        make_modelfile("x", without, system="Be kind.", stop=[])
    with pytest.raises(ModelError, match='system message with `"""`'):
        make_modelfile("x", None, system='""" quoted', stop=[])
