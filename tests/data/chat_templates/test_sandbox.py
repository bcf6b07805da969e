"""Chat templates that would compute for ever or fill the memory are refused with the reason."""

import threading
import time

import pytest
from jinja2.exceptions import TemplateError
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers.utils import chat_template_utils

from mlx_dpo.chat.response_generator import TemplateTokenizer
from mlx_dpo.data.chat_templates import limits as budget
from mlx_dpo.data.chat_templates.render import TemplateInput, call_template
from mlx_dpo.data.chat_templates.sandbox import LimitedEnvironment, install_limits
from tests.data.chat_templates import tool_templates
from tests.data.chat_templates.tool_templates import with_template
from tests.data.template_families import TEMPLATES, byte_level

TURNS = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
STEPS, SIZE, BITS = "more than 20,000 steps", "a text or list of more than", "a number of more than"
DOUBLING = "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = BODY %}{% endfor %}"
HOSTILE = {
    "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}": STEPS,
    "{% for i in range(9999) %}{% for j in range(9999) if false %}{% endfor %}{% endfor %}": STEPS,
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}":
        STEPS,
    "{% for i in range(9999) recursive %}{% if loop.depth < 9 %}{{ loop(range(9999)) }}{% endif %}"
    "{% endfor %}": STEPS,
    "{{ 'a' * 10 ** 10 }}": SIZE,
    "{{ 10 ** 10 * 'a' }}": SIZE,
    "{{ [1] * 10 ** 9 }}": SIZE,
    "{% set x = messages * 10 ** 9 %}": SIZE,
    "{{ 'a'.center(10 ** 10) }}": SIZE,
    "{{ 'a'.ljust(5) }}{{ 'a'.rjust(10 ** 10) }}": SIZE,
    "{{ ('a' | attr('zfill'))(10 ** 10) }}": SIZE,
    "{{ 'a' | center(10 ** 10) }}": SIZE,
    "{{ ['a'] | map('center', 10 ** 10) | list }}": SIZE,
    "{% filter center(10 ** 10) %}a{% endfilter %}": SIZE,
    "{{ 'a\\nb' | indent(10 ** 9) }}": SIZE,
    "{{ '%10000000000d' % 1 }}": SIZE,
    "{{ '%*d' % (10 ** 9, 1) }}": SIZE,
    "{{ '%.9000000000f' | format(1.5) }}": SIZE,
    "{{ '{:>9000000000}'.format(1) }}": SIZE,
    "{{ '{:{w}}'.format(1, w=10 ** 10) }}": SIZE,
    "{{ '{a:9000000000}'.format_map({'a': 1}) }}": SIZE,
    "{{ ('a' * 1000000).replace('a', 'bbbb') }}": SIZE,
    "{{ ('a' * 1000000) | replace('a', 'bbbb') }}": SIZE,
    "{{ ('a' * 9000) | join('a' * 9000) }}": SIZE,
    "{{ ('a' * 9000).join('a' * 9000) }}": SIZE,
    "{{ range(9000) | join('a' * 9000) }}": SIZE,
    "{{ ('\\t' * 9000).expandtabs(9000) }}": SIZE,
    "{{ ('a' * 9000).translate({97: 'b' * 9000}) }}": SIZE,
    "{{ [1] | batch(10 ** 10, 0) | list }}": SIZE,
    "{{ [1] | slice(10 ** 10) | list }}": SIZE,
    "{{ [[1]] | tojson(indent=10 ** 10) }}": SIZE,
    "{{ 1.5 | round(10 ** 8) }}": SIZE,
    "{{ (1).to_bytes(10 ** 10, 'big') }}": SIZE,
    "{{ 9 ** (9 ** 9) }}": BITS,
    DOUBLING.replace("BODY", "n.x + n.x"): SIZE,
    DOUBLING.replace("BODY", "[n.x, n.x]") + "{{ n.x }}": SIZE,
    DOUBLING.replace("BODY", "(n.x, n.x)") + "{{ {n.x: 1} }}": SIZE,
    DOUBLING.replace("BODY", "{'a': n.x, 'b': n.x}") + "{{ n.x | tojson }}": SIZE,
    DOUBLING.replace("BODY", "{'a': n.x, 'b': {'c': n.x}.items()}") + "{{ n.x }}": SIZE,
    DOUBLING.replace("BODY", "n.x ~ n.x"): SIZE,
    DOUBLING.replace("BODY", "'%s%s' % (n.x, n.x)"): SIZE,
    DOUBLING.replace("BODY", "'{0}{0}'.format(n.x)"): SIZE,
    DOUBLING.replace("BODY", "n.x | string | replace('1', '11')"): SIZE,
    DOUBLING.replace("BODY", "namespace(a=n, b=n)"): "a namespace in another value",
    DOUBLING.replace("BODY", "[namespace()]"): "a namespace in another value",
    DOUBLING.replace("BODY", "n.x * 1 + [n.x]"): SIZE,
    DOUBLING.replace("99", "999").replace("BODY", "[n.x]") + "{{ n.x }}": "nests more than",
    "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}":
        BITS,
    "{% set x %}{% for i in range(9000) %}{{ 'a' * 9000 }}{% endfor %}{% endset %}":
        "characters or entries",
    "{% for i in range(9000) %}{{ 'a' * 9000 }}{% endfor %}": SIZE,
    "{% set n = namespace(x=[]) %}{% for i in range(9000) %}"
    "{% set n.x = n.x + [('a' * 90000)[1:]] %}{% endfor %}": SIZE,
    "{% for i in range(9000) %}{% set x = ('a' * 90000) | upper %}{% endfor %}":
        "characters or entries in all",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError|recursion",
    "{{ ('<!--' * 90000) | striptags }}": "applies `striptags` to too long a text",
    "{{ ('a' * 90000).strip('b' * 90000) }}": "compares or copies too many",
    "{{ ([[1] * 900] * 9000) | sum(start=[]) }}": SIZE + "|compares or copies",
    "{{ range(10 ** 9) | list }}": "Range too big",
    "{{ messages | random }}": "uses random numbers",
    "{{ lipsum(10 ** 9) }}": "lipsum",
    "{% for a in [1] %}" * 30 + "{% endfor %}" * 30: "cannot be compiled",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "cannot be compiled",
    "{{ " + "1" * 9000 + " }}": "cannot be compiled",
    "x" * (1 << 21): "the chat template has 2,097,152 characters",
}  # fmt: skip


def rendered(template, turns=TURNS, *, tokenize=False):
    return call_template(with_template(template), TemplateInput(turns, False), tokenize=tokenize)


@pytest.fixture
def low_limits(monkeypatch):
    """Lower the limits, so that refusing a template takes no time."""
    monkeypatch.setattr(budget, "MAX_STEPS", 20_000)


@pytest.mark.parametrize("template", HOSTILE, ids=lambda template: template[:60])
def test_a_hostile_template_is_refused_with_the_reason(template, low_limits):
    begin = time.thread_time()
    with pytest.raises(TemplateError, match=HOSTILE[template]) as refused:
        rendered(template)
    assert time.thread_time() - begin < 20
    assert len(str(refused.value)) < 300


def test_a_template_is_stopped_in_another_thread(low_limits):
    """A signal could interrupt only the main thread."""
    raised = []

    def render():
        with pytest.raises(TemplateError, match="steps") as refused:
            rendered("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}")
        raised.append(refused)

    thread = threading.Thread(target=render)
    thread.start()
    thread.join(60)
    assert raised


def test_time_is_limited_where_steps_are_few(monkeypatch):
    monkeypatch.setattr(budget, "MAX_SECONDS", 0.05)
    with pytest.raises(TemplateError, match=r"computes for over 0.05 seconds"):
        rendered(
            "{% set x = 'a' * 99999 %}{% for i in range(99999) %}{% for j in range(99) %}"
            "{% set y = 'b' in x %}{% endfor %}{% endfor %}"
        )


@pytest.mark.parametrize("name", [*TEMPLATES, "QWEN", "HERMES", "MISTRAL", "LLAMA_3", "DEEPSEEK"])
def test_ordinary_templates_write_the_same_text_as_in_transformers(name):
    tokenizer = byte_level("chatml")
    source = getattr(tool_templates, name, None) or byte_level(name).chat_template
    plain = chat_template_utils._cached_compile_jinja_template(source)
    call = {"id": "abcdef123", "function": {"name": "f", "arguments": {"a": [1, None, "ü"]}}}
    turns = [*TURNS, {"role": "user", "content": " x "}]
    if name in ("QWEN", "HERMES", "MISTRAL", "LLAMA_3"):
        turns.append({"role": "assistant", "content": "", "tool_calls": [call]})
    values = {
        "tools": [call],
        "add_generation_prompt": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    expected = plain.render(messages=turns, **values)
    install_limits()
    limited = chat_template_utils._compile_jinja_template(source)
    assert limited is not plain
    assert limited.render(messages=turns, **values) == expected
    del tokenizer


@pytest.mark.parametrize(
    "template",
    [
        "{% for a, b in [(1, 2), (3, 4)] %}{{ loop.length }}{{ loop.last }}{{ a + b }}{% endfor %}",
        "{% for m in messages %}{{ (loop.previtem or m).role }}{{ (loop.nextitem or m).role }}"
        "{% endfor %}",
        "{% for m in messages recursive %}{{ m.role }}{% if loop.depth < 2 %}"
        "{{ loop(messages) }}{% endif %}{% else %}none{% endfor %}{% for x in y %}{% else %}-"
        "{% endfor %}",
        "{% set a, b = 1, 2.5 %}{{ a + b }}{{ a ~ b ~ none ~ missing }}{{ 7 % 4 }}{{ -2 ** 2 }}",
        "{% filter upper %}{{ messages[1:] }}{% endfilter %}{% set x | trim %} y {% endset %}",
        "{{ '%s and %5.1f' % ('a', 2) }}{{ '{0:>4}{b}'.format(1, b=2) }}{{ '%d' | format(3) }}",
        "{{ messages | map(attribute='role') | join(', ') }}{{ [1, 2] | sum }}{{ 'ab' | join }}",
        "{{ [[1], [2]] | sum(start=[]) }}{{ 1.25 | round(1) }}{{ [1, 2, 3] | batch(2) | list }}",
        "{% macro f(x, y=[1]) %}{{ x ~ y }}{{ caller() if caller }}{% endmacro %}{{ f('a') }}"
        "{% call f(2) %}c{% endcall %}",
        "{{ messages | selectattr('role', 'equalto', 'user') | list | tojson(indent=2) }}",
        "{% set n = namespace(l=[]) %}{% for m in messages %}{% set n.l = n.l + [m] %}{% endfor %}"
        "{{ n.l | length }}{{ dict(a=1) }}{{ {'a': {'b': 1}}.a.items() | list }}",
        "{{ 'a,b'.split(',')[::-1] | join }}{{ ' x '.strip() }}{{ 'xay'.strip('xy') }}",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}",
        "{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}",
        "{{ messages[0]['content'] | trim + '!' if messages else '' }}{{ 'a' in 'abc' }}",
        "{{ cycler('a', 'b').next() }}{% set j = joiner() %}{{ j() }}{{ j() }}{{ 3 * 'ab' }}",
        "{{ 'a' | center(5) }}{{ 'a\nb' | indent(2) }}{{ 'x' | replace('x', 'y') }}",
    ],
)  # fmt: skip
def test_the_language_of_templates_stays_whole(template):
    plain = chat_template_utils._cached_compile_jinja_template(template)
    install_limits()
    limited = chat_template_utils._compile_jinja_template(template)
    assert limited.render(messages=TURNS) == plain.render(messages=TURNS)


def test_a_long_conversation_may_become_a_long_text():
    """The limits grow with the conversation: a large row alone is no reason to refuse it."""
    turns = [{"role": "user", "content": "a" * 12_000_000}]
    source = byte_level("chatml").chat_template
    assert len(rendered(source, turns)) > 12_000_000
    many = [TURNS[i % 2] for i in range(2000)]
    collecting = (
        "{% set n = namespace(l=[], t='') %}{% for m in messages %}{% set n.l = n.l + [m] %}"
        "{% set n.t = n.t + m.content %}{% endfor %}{{ n.l | length }}{{ n.t | length }}"
    )
    assert rendered(collecting, many) == "20009000"


def test_transformers_and_the_server_compile_templates_with_the_limits():
    """A tokenizer of transformers, and mlx-lm's server through it, reach no other compiler."""
    install_limits()
    compiled = chat_template_utils._compile_jinja_template("{{ 1 }}")
    assert isinstance(compiled.environment, LimitedEnvironment)
    served = TemplateTokenizer(TokenizerWrapper(with_template("{{ 'a' * 10 ** 10 }}")))
    with pytest.raises(TemplateError, match=SIZE):
        served.apply_chat_template(TURNS, tokenize=False)
