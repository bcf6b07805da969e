import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_dpo.data.tokenization.formatting import TokenRules
from mlx_dpo.data.tokenization.tokenize import length_advice, truncate
from mlx_dpo.errors import NO_ROOM, SAME_AFTER_TRUNCATION, TOO_LONG, BadPairError
from mlx_dpo.types import TokenizedPair


def pair(prompt=(1, 2, 3, 4), chosen=(11, 12, 13), rejected=(21, 22)):
    return TokenizedPair(prompt, chosen, rejected, "pairs.jsonl:7")


@pytest.mark.parametrize("how", ["keep_start", "keep_end", "drop"])
def test_a_pair_of_exactly_max_length_is_unchanged(how):
    assert truncate(pair(), 7, how) == pair()


@pytest.mark.parametrize(
    ("how", "max_length", "kept"),
    [
        ("keep_start", 6, ((1, 2, 3, 4), (11, 12), (21, 22))),
        ("keep_start", 5, ((1, 2, 3, 4), (11,), (21,))),
        ("keep_end", 6, ((2, 3, 4), (11, 12, 13), (21, 22))),
        ("keep_end", 4, ((4,), (11, 12, 13), (21, 22))),
        ("keep_end", 3, ((4,), (11, 12), (21, 22))),
        ("keep_end", 2, ((4,), (11,), (21,))),
    ],
)
def test_each_strategy_cuts_its_part(how, max_length, kept):
    assert truncate(pair(), max_length, how) == TokenizedPair(*kept, location="pairs.jsonl:7")


@pytest.mark.parametrize(
    ("bad", "how", "max_length", "reason", "message"),
    [
        (
            pair(),
            "keep_start",
            4,
            NO_ROOM,
            "(prompt of 4 tokens, max_length 4); use --truncation keep_end or raise --max-length,",
        ),
        (pair(), "drop", 6, TOO_LONG, "(7 tokens, max_length 6); fix it,"),
        (
            pair(rejected=(11, 12)),
            "keep_start",
            6,
            SAME_AFTER_TRUNCATION,
            "(max_length 6); use --truncation keep_end or raise --max-",
        ),
        (
            pair(rejected=(11, 12)),
            "keep_end",
            3,
            SAME_AFTER_TRUNCATION,
            "(max_length 3); raise --max-",
        ),
    ],
)
def test_a_pair_that_cannot_be_truncated_is_bad(bad, how, max_length, reason, message):
    with pytest.raises(BadPairError) as error:
        truncate(bad, max_length, how)
    assert error.value.reason == reason
    assert str(error.value).startswith(f"pairs.jsonl:7: {reason} {message}")


ids = st.lists(st.integers(0, 3), min_size=1, max_size=12).map(tuple)


@given(ids, ids, ids, st.integers(2, 20), st.sampled_from(["keep_start", "keep_end", "drop"]))
def test_truncated_parts_are_slices_of_the_pair(prompt, chosen, rejected, max_length, how):
    whole = TokenizedPair(prompt, chosen, rejected, "pairs.jsonl:7")
    try:
        cut = truncate(whole, max_length, how)
    except BadPairError as bad:
        assert len(whole) > max_length
        assert how != "keep_end" or bad.reason == SAME_AFTER_TRUNCATION
        return
    assert len(cut) == min(len(whole), max_length)  # nothing is given away that has room
    assert cut.chosen
    assert cut.rejected
    assert cut.prompt
    assert chosen[: len(cut.chosen)] == cut.chosen
    assert rejected[: len(cut.rejected)] == cut.rejected
    assert prompt[-len(cut.prompt) :] == cut.prompt
    if how == "keep_start":
        assert cut.prompt == prompt
    if how == "keep_end" and len(cut.prompt) > 1:
        assert (cut.chosen, cut.rejected) == (chosen, rejected)


BEGUN = (9, 1, 2, 3, 4, 5)  # 9 begins the text; turns begin at 2 and at 4


@pytest.mark.parametrize(
    ("max_length", "turns", "prompt"),
    [
        (8, (), (9, 2, 3, 4, 5)),
        (7, (), (9, 3, 4, 5)),
        (8, (2, 4), (9, 2, 3, 4, 5)),
        (7, (2, 4), (9, 4, 5)),  # rather a whole turn than as much as fits
        (5, (2, 4), (9, 5)),  # not even the last turn has room
        (3, (2, 4), (9, 5)),
        (2, (), (5,)),  # one of the prompt, one of a completion
    ],
)
def test_keep_end_keeps_the_bos_token_and_whole_turns(max_length, turns, prompt):
    whole = TokenizedPair(BEGUN, (11, 12, 13), (21, 22), "pairs.jsonl:7")
    cut = truncate(whole, max_length, "keep_end", keep_bos=True, turn_starts=turns)
    assert cut.prompt == prompt
    assert cut.chosen == (11, 12, 13)[: max_length - len(prompt)]


def test_a_larger_max_length_is_not_advised_beyond_the_context():
    assert length_advice("keep_start", can_be_longer=True) == (
        "use --truncation keep_end or raise --max-length"
    )
    assert length_advice("keep_start", can_be_longer=False) == "use --truncation keep_end"
    assert length_advice("keep_end", can_be_longer=False) == "shorten the row"
    with pytest.raises(BadPairError) as error:
        truncate(pair(), 4, "keep_start", can_be_longer=False)
    assert "--max-length" not in str(error.value)
    assert TokenRules(max_length=512, context=1024).can_be_longer
    assert not TokenRules(max_length=512, context=512).can_be_longer
