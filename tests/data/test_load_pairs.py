import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_dpo.data.columns import pairs_digest
from mlx_dpo.data.load import check_settings_used, held_out_indices, load_pairs, mix_indices
from mlx_dpo.data.tokenization.formatting import TokenRules
from mlx_dpo.errors import (
    EMPTY_COMPLETION,
    NO_ROOM,
    SAME_TEXT,
    TOO_LONG,
    BadPairError,
    ConfigError,
    DataError,
    ModelError,
)
from mlx_dpo.schemas.schema import RowRules
from mlx_dpo.types import TokenizedPair
from tests.data.byte_tokenizer import ASSISTANT, BOS, EOS, USER

GOOD = {"prompt": "hi", "chosen": "yo", "rejected": "no!"}
RULES = TokenRules(vocab_size=262)


def test_pairs_have_the_order_and_the_locations_of_the_file(write, plain):
    found = load_pairs(write(GOOD, "", GOOD | {"chosen": "ya"}), plain, RULES)
    assert list(found.pairs) == [
        TokenizedPair((BOS, *b"hi"), (*b"yo", EOS), (*b"no!", EOS), "pairs.jsonl:1"),
        TokenizedPair((BOS, *b"hi"), (*b"ya", EOS), (*b"no!", EOS), "pairs.jsonl:3"),
    ]


def test_a_bad_pair_raises_an_error_unless_it_is_dropped(write, plain):
    path = write(GOOD, GOOD | {"chosen": ""}, GOOD | {"rejected": "yo"}, GOOD | {"chosen": " "})
    with pytest.raises(BadPairError, match=r"^pairs\.jsonl:2: a completion is empty; fix it, or"):
        load_pairs(path, plain, RULES)
    found = load_pairs(path, plain, RULES, bad_pairs="drop")
    assert [pair.location for pair in found.pairs] == ["pairs.jsonl:1"]
    assert (found.report.read, found.report.used) == (4, 1)
    assert found.report.dropped == {
        EMPTY_COMPLETION: ["pairs.jsonl:2", "pairs.jsonl:4"],
        SAME_TEXT: ["pairs.jsonl:3"],
    }


@pytest.mark.parametrize("line", ["{", '{"prompt": "a"}', "[]"])
def test_an_invalid_line_raises_an_error_even_if_bad_pairs_are_dropped(write, plain, line):
    with pytest.raises(DataError, match=r"^pairs\.jsonl:2: "):
        load_pairs(write(GOOD, line), plain, RULES, bad_pairs="drop")


def test_pairs_that_are_too_long_are_dropped_with_truncation_drop(write, plain):
    """Other bad pairs still raise an error."""
    long = GOOD | {"rejected": "n" * 10}
    rules = TokenRules(vocab_size=262, max_length=8, truncation="drop")
    found = load_pairs(write(long, GOOD), plain, rules)
    assert found.report.dropped == {TOO_LONG: ["pairs.jsonl:1"]}
    with pytest.raises(BadPairError, match=SAME_TEXT):
        load_pairs(write(long, GOOD | {"chosen": "no!"}), plain, rules)
    with pytest.raises(BadPairError, match=NO_ROOM):
        load_pairs(write(GOOD), plain, TokenRules(vocab_size=262, max_length=3))


def test_no_pair_left_raises_an_error_with_the_reasons(write, plain):
    with pytest.raises(DataError) as error:
        load_pairs(write(GOOD | {"chosen": ""}), plain, RULES, bad_pairs="drop")
    assert str(error.value) == (
        "pairs.jsonl: no usable pair (1 of 1: a completion is empty); give other pairs"
    )
    thumb = {"prompt": "a", "completion": "b", "label": True}
    with pytest.raises(DataError, match=r"other label\); use --loss-type kto, which needs no"):
        load_pairs(write(thumb), plain, RULES, rows=RowRules(pair_labelled=True))
    with pytest.raises(DataError, match=r"^pairs\.jsonl: contains no pairs"):
        load_pairs(write(), plain, RULES)


def test_rules_are_checked_before_the_file_is_read(write, plain):
    plain.eos_token_id = None
    with pytest.raises(ModelError):
        load_pairs(write("{"), plain, RULES)


def test_thinking_has_no_effect_on_pairs_that_stay_text(write, chat):
    path = write({"chosen": "Q: a A: b", "rejected": "Q: a A: c"})
    rules = TokenRules(vocab_size=262, thinking=True)
    report = load_pairs(path, chat("{{ enable_thinking }}"), rules).report
    with pytest.raises(ConfigError, match="no pair goes through the chat template"):
        check_settings_used(rules, RowRules(), [report])


def test_text_with_turn_marks_becomes_messages_if_there_is_a_template(write, chat, plain):
    shared = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    path = write({"chosen": shared + " d ", "rejected": shared + " e"})
    turns = (USER, *b"a", EOS, ASSISTANT, *b"b", EOS, USER, *b"c", EOS, ASSISTANT)
    for chat_template in ("auto", "chat"):
        rules = TokenRules(vocab_size=262, chat_template=chat_template)
        [pair] = load_pairs(path, chat(), rules).pairs
        assert (pair.prompt, pair.chosen, pair.rejected) == (turns, (*b"d", EOS), (*b"e", EOS))
    [pair] = load_pairs(path, chat(), TokenRules(vocab_size=262, chat_template="text")).pairs
    assert pair.prompt == tuple(chat().encode(shared))
    [pair] = load_pairs(path, plain, RULES).pairs
    assert pair.prompt == tuple(plain.encode(shared))


def test_text_with_an_implicit_prompt_and_no_turn_marks_stays_text(write, chat):
    [pair] = load_pairs(
        write({"chosen": "Q: a A: b", "rejected": "Q: a A: c"}), chat(), RULES
    ).pairs
    assert pair.prompt == tuple(b"Q: a A:")


def test_the_real_dialogues_are_complete(material, stories):
    """The ids of prompt and completion are those of the whole text."""
    path = material / "data" / "hh-harmless-test" / "test.jsonl"
    rules = TokenRules(vocab_size=512, max_length=100_000, chat_template="text")
    found = load_pairs(path, stories, rules, bad_pairs="drop")
    assert (found.report.read, found.report.used) == (2312, 2303)
    for pair in found.pairs[::100]:
        for completion in (pair.chosen, pair.rejected):
            text = stories.decode(pair.prompt[1:] + completion[:-1])
            assert stories.encode(text) == [*pair.prompt, *completion[:-1]]
        assert stories.decode(pair.prompt).endswith("\n\nAssistant:")


def with_prompts(*prompts):
    return [TokenizedPair((prompt,), (8, i), (9, i)) for i, prompt in enumerate(prompts)]


def hold_out(pairs, **options):
    """Return the training pairs and the held-out pairs, each in the order of `pairs`."""
    held_out = held_out_indices(pairs, **options)
    train = [pair for index, pair in enumerate(pairs) if index not in held_out]
    return train, [pairs[index] for index in sorted(held_out)]


def mixed(pairs, weight, *, seed):
    """Return the pairs of a source as often as its weight says."""
    return [pairs[index] for index in mix_indices(len(pairs), weight, seed=seed)]


def test_held_out_pairs_keep_the_order_of_the_file():
    pairs = with_prompts(*range(20))
    train, held = hold_out(pairs, share=0.25, seed=3)
    assert len(held) == 5
    assert [pair for pair in pairs if pair in held] == held
    assert [pair for pair in pairs if pair not in held] == train
    assert hold_out(pairs, share=0.25, seed=3) == (train, held)
    assert hold_out(pairs, share=0.25, seed=4) != (train, held)
    assert hold_out(pairs, share=0.25, seed=-1) != (train, held)


def test_nothing_is_held_out_for_a_share_of_0_or_a_single_pair():
    pairs = with_prompts(1, 2)
    assert hold_out(pairs, share=0.0, seed=0) == (pairs, [])
    assert hold_out(pairs[:1], share=0.5, seed=0) == (pairs[:1], [])


def test_pairs_with_one_prompt_cannot_be_held_out():
    with pytest.raises(ConfigError, match="all pairs have the same prompt"):
        hold_out(with_prompts(1, 1, 1), share=0.5, seed=0)


@given(st.lists(st.integers(0, 4), min_size=2, max_size=30), st.floats(0.01, 0.99), st.integers())
def test_no_prompt_is_in_both_splits_and_no_split_is_empty(prompts, share, seed):
    if len(set(prompts)) == 1:
        prompts.append(5)
    pairs = with_prompts(*prompts)
    train, held = hold_out(pairs, share=share, seed=seed)
    assert {p.prompt for p in train}.isdisjoint(p.prompt for p in held)
    assert train
    assert held
    assert sorted([*train, *held], key=pairs.index) == pairs
    smallest = min(map(prompts.count, prompts))
    assert len(held) <= max(1, round(share * len(pairs)), smallest)


@pytest.mark.parametrize(
    ("weight", "count"), [(1, 10), (2, 20), (0.5, 5), (2.5, 25), (0.01, 1), (0.26, 3)]
)
def test_a_weight_is_the_number_of_uses_of_each_pair(weight, count):
    pairs = with_prompts(*range(10))
    found = mixed(pairs, weight, seed=(3, 0))
    assert len(found) == count
    often = [found.count(pair) for pair in pairs]
    assert max(often) - min(often) <= 1
    assert mixed(pairs, weight, seed=(3, 0)) == found
    if weight % 1:
        seeds = [mixed(pairs, weight, seed=(seed, n)) for seed in (4, 5, -1) for n in (0, 1)]
        assert any(other != found for other in seeds)
    assert mixed([], weight, seed=(3, 0)) == []


def test_the_digest_depends_on_where_a_part_ends():
    parted = [
        [TokenizedPair((1, 2), (3,), (4,))],
        [TokenizedPair((1,), (2, 3), (4,))],
        [TokenizedPair((1,), (2,), (3, 4))],
        [TokenizedPair((1, 2), (4,), (3,))],
        [TokenizedPair((1,), (2,), (3,)), TokenizedPair((4,), (5,), (6,))],
        [TokenizedPair((4,), (5,), (6,)), TokenizedPair((1,), (2,), (3,))],
        [TokenizedPair((258, 2), (3,), (4,))],  # 1 plus a byte's worth
        [],
    ]
    assert len({pairs_digest(pairs) for pairs in parted}) == len(parted)


def test_the_digest_ignores_locations_and_never_changes():
    here, there = (TokenizedPair((1, 2), (3,), (4,), where) for where in ("a:1", "b:9"))
    assert pairs_digest([here]) == pairs_digest([there])
    parts = [struct.pack(f"<{len(ids)}i", *ids) for ids in ((1, 2), (3,), (4,))]
    whole = b"".join(hashlib.blake2b(part, digest_size=16).digest() for part in parts)
    whole += struct.pack("<2d", 0.0, 1.0) + b"\xff"  # margin, weight, and no judgement
    assert pairs_digest([here]) == hashlib.sha256(whole).hexdigest()


def test_prompts_that_truncation_made_different_are_held_out_together(write, plain):
    """A longer completion leaves less of the prompt, which still is one prompt."""
    rows = [
        {"prompt": f"{who} asks: what is it?", "chosen": "y" * length, "rejected": "no"}
        for who in "abcdefgh"
        for length in (3, 5, 9, 12)
    ]
    rules = TokenRules(vocab_size=262, max_length=24, truncation="keep_end")
    pairs = load_pairs(write(*rows), plain, rules).pairs
    assert len({pair.prompt for pair in pairs}) > 8
    train, held = hold_out(pairs, share=0.25, seed=0)
    prompts = [row["prompt"] for row in rows]
    line = {pair.location: prompt for pair, prompt in zip(pairs, prompts, strict=True)}
    assert len(held) == 8
    assert not {line[pair.location] for pair in held} & {line[pair.location] for pair in train}
