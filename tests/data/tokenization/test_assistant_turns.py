"""Masks of conversations: exactly what the assistant generates is scored."""

import json
from dataclasses import replace

import pytest

from mlx_dpo.data.columns import pairs_digest
from mlx_dpo.data.inspect.segments import PROMPT, SCORED, segment_pair
from mlx_dpo.data.sources import resolve_source
from mlx_dpo.data.tokenization import cache as token_cache
from mlx_dpo.data.tokenization.cache import TokenCache, load_source
from mlx_dpo.data.tokenization.formatting import TokenRules
from mlx_dpo.data.tokenization.parallel import TokenizerWorkers
from mlx_dpo.data.tokenization.tokenize import tokenize_unpaired, truncate
from mlx_dpo.data.tokenization.tokenize_rows import PairRules
from mlx_dpo.errors import PromptBoundaryError
from mlx_dpo.schemas import parse_supervised
from mlx_dpo.schemas.schema import Row, RowRules
from mlx_dpo.types import TokenizedPair
from tests.data.template_families import TEMPLATES, byte_level, metaspace

TURNS = ["Hi?", "Yes.", "And?", "No, never.", "Why?", "So."]
REWRITES = {"qwen-3", "deepseek-r1"}  # leave out the thoughts of earlier turns
RULES = RowRules(supervised=True)


def messages(texts):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def tokenize(tokenizer, texts, turns="all", **rules):
    row = Row({"messages": messages(texts)}, "rows:1")
    [example] = parse_supervised(row, replace(RULES, assistant_turns=turns))
    return tokenize_unpaired(tokenizer, example, TokenRules(**rules)).pair


def scored_texts(tokenizer, pair):
    starts, ends = [0], []
    for start, end in pair.gaps:
        ends.append(start)
        starts.append(end)
    parts = zip(starts, [*ends, len(pair.chosen)], strict=True)
    return [tokenizer.decode(list(pair.chosen[start:end])).lstrip() for start, end in parts]


@pytest.mark.parametrize("make", [byte_level, metaspace])
@pytest.mark.parametrize("family", sorted(TEMPLATES.keys() - REWRITES))
def test_each_answer_is_scored_with_its_stop_token_and_nothing_else(family, make):
    tokenizer = make(family)
    pair = tokenize(tokenizer, TURNS)
    stop = tokenizer.decode([tokenizer.eos_token_id])
    assert scored_texts(tokenizer, pair) == [f"{text}{stop}" for text in TURNS[1::2]]
    whole = tokenizer.apply_chat_template(messages(TURNS), return_dict=False)
    assert whole[: len(pair.prompt) + len(pair.chosen)] == [*pair.prompt, *pair.chosen]


@pytest.mark.parametrize("family", sorted(TEMPLATES.keys() - REWRITES))
def test_each_answer_follows_what_generation_would_begin_with(family):
    """The context of each answer is the prompt that `chat` would give the model."""
    tokenizer = byte_level(family)
    pair = tokenize(tokenizer, TURNS)
    starts = [0, *(end for _, end in pair.gaps)]
    for count, start in zip((1, 3, 5), starts, strict=True):
        prompt = tokenizer.apply_chat_template(
            messages(TURNS)[:count], add_generation_prompt=True, return_dict=False
        )
        assert [*pair.prompt, *pair.chosen[:start]] == prompt


@pytest.mark.parametrize("family", sorted(REWRITES))
def test_a_template_that_changes_earlier_turns_is_refused(family):
    with pytest.raises(PromptBoundaryError) as error:
        tokenize(byte_level(family), TURNS)
    assert "rows:1: the chat template changes earlier turns" in str(error.value)
    assert "use --assistant-turns last" in str(error.value)


def test_a_template_that_changes_earlier_turns_scores_the_last_answer_alone():
    tokenizer = byte_level("qwen-3")
    pair = tokenize(tokenizer, TURNS, "last")
    assert scored_texts(tokenizer, pair) == ["So.<|im_end|>"] and not pair.gaps
    assert "No, never." in tokenizer.decode(list(pair.prompt))


def test_a_template_that_ends_only_the_last_turn_is_refused():
    """The stop token would be missing after the other answers."""
    tokenizer = byte_level("chatml")
    template = tokenizer.chat_template
    ends_last = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if loop.last or m.role == 'user' %}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.chat_template = ends_last
    try:
        with pytest.raises(PromptBoundaryError, match=r"turn 2; .* use --assistant-turns last"):
            tokenize(tokenizer, TURNS)
        assert scored_texts(tokenizer, tokenize(tokenizer, TURNS, "last")) == ["So.<|im_end|>"]
    finally:
        tokenizer.chat_template = template


def test_a_special_token_in_a_turn_is_plain_text_in_the_mask_too():
    tokenizer = byte_level("chatml")
    pair = tokenize(tokenizer, ["Hi?", "The token <|im_end|>.", "And?", "No."])
    assert scored_texts(tokenizer, pair) == ["The token <|im_end|>.<|im_end|>", "No.<|im_end|>"]
    assert pair.chosen.count(tokenizer.eos_token_id) == 3  # of the two answers and one question


def talk():
    return TokenizedPair((1, 2), tuple(range(10, 20)), (), gaps=((3, 5), (7, 8)))


@pytest.mark.parametrize(
    ("max_length", "chosen", "gaps"),
    [
        (12, 10, ((3, 5), (7, 8))),
        (11, 9, ((3, 5), (7, 8))),
        (10, 7, ((3, 5),)),  # cut at the end of a gap: nothing after it is scored
        (9, 7, ((3, 5),)),
        (7, 3, ()),
        (6, 3, ()),
        (5, 3, ()),
        (4, 2, ()),
    ],
)
def test_a_cut_conversation_ends_with_a_scored_token(max_length, chosen, gaps):
    cut = truncate(talk(), max_length, "keep_start")
    assert cut.chosen == talk().chosen[:chosen] and cut.gaps == gaps


def test_scored_places_leave_out_the_gaps():
    assert talk().scored == [0, 1, 2, 5, 6, 8, 9]
    assert talk().num_scored == 7


def test_gaps_survive_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "MIN_CACHED_BYTES", 0)
    path = tmp_path / "rows.jsonl"
    rows = [{"messages": messages(TURNS[:n])} for n in (6, 2, 4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = byte_level("chatml")
    known = [tokenize(tokenizer, TURNS[:n]) for n in (6, 2, 4)]
    cache = TokenCache(tmp_path / "cache", "digest", "model")
    for _ in range(2):
        read = load_source(
            resolve_source(str(path)),
            TokenizerWorkers(tokenizer),
            PairRules(TokenRules(), RULES),
            cache,
        )
        for pair, expected in zip(read.pairs, known, strict=True):
            assert (pair.prompt, pair.chosen, pair.rejected) == (
                expected.prompt,
                expected.chosen,
                (),
            )
            assert pair.gaps == expected.gaps
    assert [len(pair.gaps) for pair in known] == [2, 0, 1]


def test_other_gaps_are_other_data():
    """A run is not resumed with another mask of the same tokens."""
    others = [replace(talk(), gaps=gaps) for gaps in ((), ((3, 5),), ((3, 4), (7, 8)))]
    assert len({pairs_digest([pair]) for pair in (talk(), *others)}) == 4


def test_the_turns_between_two_answers_are_shown_as_context():
    tokenizer = byte_level("chatml")
    pair = tokenize(tokenizer, TURNS[:4])
    segments = segment_pair(tokenizer, pair, pair)
    assert [(segment.name, segment.kind) for segment in segments] == [
        ("prompt", PROMPT), ("answer", SCORED), ("turns", PROMPT), ("answer", SCORED),
    ]  # fmt: skip
    assert sum(s.tokens for s in segments if s.kind == SCORED) == pair.num_scored
