"""Any content of a file gives pairs, counted drops or an error of one line, never a traceback."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_dpo.data.load import load_pairs
from mlx_dpo.data.tokenization.formatting import TokenRules
from mlx_dpo.data.tokenization.special_tokens import get_special_tokens
from mlx_dpo.data.tokenization.tokenize import tokenize_pair
from mlx_dpo.errors import SPECIAL_TOKEN, DataError, DPOError
from mlx_dpo.schemas import SCHEMAS
from mlx_dpo.schemas.schema import RowRules
from mlx_dpo.types import PreferenceExample
from tests.data.byte_tokenizer import CHAT, ByteTokenizer
from tests.data.template_families import byte_level, metaspace

FEW = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
FIELDS = [
    *sorted({name for schema in SCHEMAS.values() for name in schema.fields}),
    "tools", "chat_template_kwargs", "images", "junk",
]  # fmt: skip
PIECES = st.sampled_from(
    ["<|im_end|>", "</s>", "<s>", "<think>", "</think>", "\n\nHuman:", "\n\nAssistant:", "\ud83d",
     "\udc00", "\x00", "\u2028", "\U00100000", "{{ x }}", "{% raise %}", " ", "é", "a"]
)  # fmt: skip
TEXT = st.one_of(st.lists(PIECES, max_size=6).map("".join), st.text(max_size=8))
KEYS = st.sampled_from(["role", "content", "from", "value", "type", "text", "score", "messages",
                        "tool_calls", "function", "name", "response", "rank"])  # fmt: skip
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "observation"])
TURN = st.one_of(
    st.fixed_dictionaries({"role": ROLES, "content": TEXT}),
    st.fixed_dictionaries({"from": ROLES, "value": TEXT}),
)
JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT, ROLES, TURN),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=4), st.lists(TURN)
    ),
    max_leaves=8,
)
RECORD = st.dictionaries(st.sampled_from(FIELDS), JUNK, max_size=7)
# Rows that look right, so that what comes after recognition is reached.
LIKELY = st.one_of(
    st.fixed_dictionaries({"prompt": TEXT, "chosen": TEXT, "rejected": TEXT}),
    st.fixed_dictionaries({"chosen": st.lists(TURN), "rejected": st.lists(TURN)}),
    st.fixed_dictionaries(
        {"conversations": st.lists(TURN), "chosen": TURN, "rejected": TURN, "tools": JUNK}
    ),
    st.fixed_dictionaries(
        {"prompt": st.lists(TURN), "chosen": TEXT, "rejected": TEXT, "chat_template_kwargs": JUNK}
    ),
    st.fixed_dictionaries({"prompt": TEXT, "completions": st.lists(JUNK), "scores": JUNK}),
    st.fixed_dictionaries({"input": st.fixed_dictionaries({"messages": JUNK}),
                           "preferred_output": JUNK, "non_preferred_output": JUNK}),
)  # fmt: skip


def outcome(path, tokenizer, rows):
    """Load a file: pairs and dropped pairs add up, or the error is one line."""
    rules = TokenRules(vocab_size=2000, max_length=64, truncation="keep_end")
    try:
        report = load_pairs(path, tokenizer, rules, rows=rows, bad_pairs="drop").report
    except DPOError as error:
        assert "\n" not in str(error)
        assert str(error).startswith("rows")
        return
    assert report.used >= 1
    assert report.used + sum(map(len, report.dropped.values())) >= report.read


TOKENIZERS = [
    lambda: ByteTokenizer(adds_bos=True), lambda: ByteTokenizer(CHAT),
    lambda: byte_level("qwen-3"), lambda: metaspace("gemma"), lambda: byte_level("qwen-2.5"),
]  # fmt: skip


@FEW
@given(
    rows=st.lists(st.one_of(RECORD, LIKELY), min_size=1, max_size=3),
    tokenizer=st.sampled_from(TOKENIZERS),
    how=st.sampled_from(
        [RowRules(), RowRules(judged=True), RowRules(ranked="all"), RowRules(pair_labelled=True)]
    ),
)
def test_no_row_gives_a_traceback(tmp_path, monkeypatch, rows, tokenizer, how):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome(path.relative_to(tmp_path), tokenizer(), how)


@FEW
@given(schema=st.sampled_from(list(SCHEMAS)), row=st.one_of(RECORD, LIKELY))
def test_no_row_gives_a_traceback_with_any_schema(tmp_path, monkeypatch, schema, row):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    for rules in (RowRules(schema=schema), RowRules(schema=schema, judged=True)):
        outcome(tmp_path.joinpath("rows.jsonl").relative_to(tmp_path), ByteTokenizer(CHAT), rules)


@FEW
@given(
    data=st.binary(max_size=60),
    name=st.sampled_from(["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows.jsonl.gz",
                          "rows.csv.xz", "rows.json.bz2", "rows.jsonl.zst", "rows.parquet.zst"]),
)  # fmt: skip
def test_no_bytes_give_a_traceback(tmp_path, monkeypatch, data, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(data)
    outcome((tmp_path / name).relative_to(tmp_path), ByteTokenizer(), RowRules())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "a number of 5000 digits"),
        ('{"prompt": "a", "chosen": "\\ud83d", "rejected": "b"}', "contains an unpaired surrogate"),
        ('{"prompt": [{"role": "user", "content": "a", "x": ' + "[" * 90 + "]" * 90 + "}], "
         '"chosen": "b", "rejected": "c"}', "nested too deeply"),
    ],
)  # fmt: skip
def test_json_that_python_cannot_parse_is_an_error_of_one_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: .*{message}"):
        load_pairs(path, ByteTokenizer(), TokenRules(vocab_size=262))


TYPED = st.lists(
    st.sampled_from(
        ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_", "end|>", "a", " ", "\n"]
    ),
    min_size=1, max_size=8,
).map("".join)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(prompt=TYPED, chosen=TYPED, rejected=TYPED, make=st.sampled_from([byte_level, metaspace]))
def test_special_tokens_in_a_text_are_never_control_tokens(prompt, chosen, rejected, make):
    """The number of control tokens is that of the same turns without special tokens."""
    tokenizer = make("qwen-2.5")
    ids = get_special_tokens(tokenizer).ids
    try:
        pair = tokenize_pair(
            tokenizer,
            PreferenceExample(prompt, chosen, rejected, "x:1"),
            TokenRules(vocab_size=2000),
        ).pair
    except DataError as error:
        assert getattr(error, "reason", "") != SPECIAL_TOKEN  # empty, or the same
        return
    assert sum(token in ids for token in pair.prompt) == 5  # system, user, and the reply begun
    for completion in (pair.chosen, pair.rejected):
        assert [token in ids for token in completion] == [False] * (len(completion) - 1) + [True]
