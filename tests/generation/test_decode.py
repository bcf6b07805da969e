import random
from pathlib import Path

import mlx_lm
import pytest

from mlx_dpo.generation.decode import StreamingDecoder, ThinkingSplitter, decode_tokens
from tests.checkpoints import write_tokenizer

MATERIAL = Path(__file__).parents[2] / ".." / "shared" / "material" / "models"


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    write_tokenizer(folder)
    return mlx_lm.tokenizer_utils.load(folder)


def pieces(tokenizer, tokens):
    stream = StreamingDecoder(tokenizer)
    return [*map(stream.add, tokens), stream.finish()]


TEXTS = (
    "",
    " on the hill",
    "the cats.\n\nthe cats. cats",
    "dog 🐶🐶, naïve 日本 \t e\u0301 👩‍🚀",
    "  two  spaces  ",
    "a replacement \ufffd of its own",
)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_the_pieces_of_a_text_are_the_text(kind, text, request):
    tokenizer = request.getfixturevalue(kind)
    if kind == "sentencepiece":
        names = [f"<0x{byte:02X}>" for byte in text.encode()]
        tokens = [3, 4, *tokenizer.convert_tokens_to_ids(names), 4, 5]
        text = f"the cat{text} cats"
    else:
        tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert decode_tokens(tokenizer, tokens) == text


def test_the_pieces_of_any_bytes_are_the_decoded_whole(byte_level):
    draw = random.Random(0)
    for length in (1, 2, 5, 40) * 30:
        tokens = [draw.randrange(len(byte_level)) for _ in range(length)]
        assert decode_tokens(byte_level, tokens) == byte_level.decode(tokens)


def test_spaces_between_words_survive_where_a_decoder_strips_the_first(sentencepiece):
    the, cat, s = sentencepiece.convert_tokens_to_ids(["▁the", "▁cat", "s"])
    assert pieces(sentencepiece, [the, cat, s, cat]) == ["the", " cat", "s", " cat", ""]


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_a_character_waits_for_its_last_byte(kind, request):
    tokenizer = request.getfixturevalue(kind)
    names = {
        "byte_level": tokenizer.convert_ids_to_tokens(tokenizer.encode("🐶")),
        "sentencepiece": ["<0xF0>", "<0x9F>", "<0x90>", "<0xB6>"],
    }[kind]
    dog = tokenizer.convert_tokens_to_ids(names)
    assert pieces(tokenizer, dog) == ["", "", "", "🐶", ""]
    assert pieces(tokenizer, dog[:2])[:2] == ["", ""]  # a half one is told only at the end
    assert set(pieces(tokenizer, dog[:2])[2]) == {"\ufffd"}


@pytest.mark.skipif(not MATERIAL.is_dir(), reason="no real models next to the checkout")
@pytest.mark.parametrize("name", ["stories260K", "babyllama-char105"])
def test_real_tokenizers_stream_what_they_decode(name):
    tokenizer = mlx_lm.tokenizer_utils.load(MATERIAL / name)
    tokens = tokenizer.encode("Once upon a time, there was a little girl.\nShe said: go!")
    assert decode_tokens(tokenizer, tokens) == tokenizer.decode(tokens)


CASES = {
    "no marks": ("Just this.", False, "", "Just this."),
    "thought first": ("<think>hm</think>\n\nYes.", False, "<think>hm</think>", "\n\nYes."),
    "begun by the template": ("hm</think>Yes.", True, "hm</think>", "Yes."),
    "cut while thinking": ("<think>hm, well", False, "<think>hm, well", ""),
    "thought twice": ("<think>a</think>b<think>c</think>d", False,
                      "<think>a</think><think>c</think>", "bd"),
    "nearly a mark": ("a <thin line < 3", False, "", "a <thin line < 3"),
    "ends in half a mark": ("a <thi", False, "", "a <thi"),
    "an end without a start": ("a</think>b", False, "", "a</think>b"),
}  # fmt: skip


def cuts(text, size):
    return [text[i : i + size] for i in range(0, len(text), size)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("name", CASES)
def test_parts_are_the_same_however_the_text_comes(name, size):
    text, within, thought, answer = CASES[name]
    split = ThinkingSplitter("<think>", "</think>", within=within)
    parts = [part for cut in cuts(text, size) for part in split.feed(cut)] + [*split.finish()]
    assert "".join(part.text for part in parts) == text
    assert "".join(part.text for part in parts if part.thinking) == thought
    assert "".join(part.text for part in parts if not part.thinking) == answer


def test_a_model_that_knows_no_thinking_only_answers():
    split = ThinkingSplitter(None, None, within=True)
    assert [*split.feed("<think>")] == [("<think>", False)]
    assert [*split.finish()] == []


def test_only_what_may_begin_a_mark_is_held_back():
    split = ThinkingSplitter("<think>", "</think>")
    assert [*split.feed("well <")] == [("well ", False)]
    assert [*split.feed("3")] == [("<3", False)]
