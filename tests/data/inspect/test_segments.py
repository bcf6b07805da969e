"""A pair in parts: what is read, scored and cut."""

import pytest

from mlx_dpo.data.inspect.segments import TokenText, segment_pair
from mlx_dpo.data.tokenization.formatting import TokenRules
from mlx_dpo.data.tokenization.tokenize import tokenize_pair
from mlx_dpo.types import PreferenceExample, TokenizedPair
from tests.data.byte_tokenizer import ASSISTANT, BOS, EOS, USER, ByteTokenizer
from tests.data.template_families import TEMPLATES, byte_level, metaspace


def ids(*parts):
    return tuple(i for part in parts for i in ([part] if isinstance(part, int) else part.encode()))


WHOLE = TokenizedPair(ids(BOS, USER, "hi", EOS, ASSISTANT), ids("yes!", EOS), ids("no", EOS))


def told(parts):
    return [(part.name, part.kind, "".join(piece.text for piece in part.pieces)) for part in parts]


def test_segments_are_in_order_with_special_tokens_separate(chat):
    parts = segment_pair(chat(), WHOLE, WHOLE)
    assert told(parts) == [
        ("prompt", "prompt", "<s><U>hi</s><A>"),
        ("chosen", "scored", "yes!</s>"),
        ("rejected", "scored", "no</s>"),
    ]
    assert parts[0].pieces == [
        TokenText("<s>", True), TokenText("<U>", True), TokenText("hi", False),
        TokenText("</s>", True), TokenText("<A>", True),
    ]  # fmt: skip
    assert [part.tokens for part in parts] == [6, 5, 3]


def test_the_truncated_end_of_a_completion_follows_it(chat):
    kept = TokenizedPair(WHOLE.prompt, ids("ye"), WHOLE.rejected)
    assert told(segment_pair(chat(), WHOLE, kept))[1:] == [
        ("chosen", "scored", "ye"),
        ("chosen", "cut", "s!</s>"),
        ("rejected", "scored", "no</s>"),
    ]


@pytest.mark.parametrize(
    ("kept", "parts"),
    [
        (ids("i", EOS, ASSISTANT), [("cut", "<s><U>h"), ("prompt", "i</s><A>")]),
        (ids(BOS, EOS, ASSISTANT), [("prompt", "<s>"), ("cut", "<U>hi"), ("prompt", "</s><A>")]),
    ],
)
def test_a_prompt_is_truncated_at_its_start_after_the_bos(chat, kept, parts):
    found = segment_pair(chat(), WHOLE, TokenizedPair(kept, WHOLE.chosen, WHOLE.rejected))
    assert [(kind, text) for _, kind, text in told(found)[:-2]] == parts


def test_an_unpaired_example_has_one_completion(chat):
    judged = TokenizedPair(WHOLE.prompt, WHOLE.chosen, ids("other"), desirable=True)
    assert [part.name for part in segment_pair(chat(), judged, judged)] == ["prompt", "answer"]


@pytest.mark.parametrize("make", [byte_level, metaspace])
@pytest.mark.parametrize("name", ["llama-3", "chatml", "mistral", "zephyr"])
def test_the_pieces_concatenate_to_the_text_of_the_tokens(make, name):
    """Also where the decoder drops a space that a text begins with."""
    tokenizer = make(name)
    said = PreferenceExample("a b  c", " d e", "f\n g", "x:1")
    rules = TokenRules(vocab_size=10_000, max_length=1000)
    pair = tokenize_pair(tokenizer, said, rules).pair
    prompt, chosen, _ = segment_pair(tokenizer, pair, pair)
    for part, tokens in ((prompt, pair.prompt), (chosen, pair.chosen)):
        assert "".join(piece.text for piece in part.pieces) == tokenizer.decode(list(tokens))
    special = {piece.text.strip() for piece in prompt.pieces if piece.special}
    begin, end, others = TEMPLATES[name]
    assert special <= {begin, end, *others}
    assert "a b  c" in "".join(piece.text for piece in prompt.pieces)


def test_a_space_that_the_decoder_drops_at_the_start_is_kept_inside_the_text():
    class Drops(ByteTokenizer):
        def decode(self, ids):
            return super().decode(ids).removeprefix(" ")

    pair = TokenizedPair(ids(USER, " a", EOS), ids(" b", EOS), ids("c"))
    assert told(segment_pair(Drops(), pair, pair))[0][2] == "<U> a</s>"
