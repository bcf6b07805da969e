import random
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast

from mlx_dpo.config.sampling import Sampling
from mlx_dpo.generation.generate import (
    StreamingDecoder,
    context_length,
    decode_tokens,
    encode_text,
    make_logits_processors,
    make_sampler,
)
from tests.checkpoints import write_tokenizer

MATERIAL = Path(__file__).parents[2] / ".." / "shared" / "material" / "models"
PROBABILITIES = (0.5, 0.3, 0.15, 0.05)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    write_tokenizer(folder)
    return mlx_lm.tokenizer_utils.load(folder)


@pytest.fixture(scope="module")
def sentencepiece():
    """Words that carry their space in front, and bytes for whatever has no word."""
    words = ["<s>", "</s>", "▁", "▁the", "▁cat", "s", ".", "\n"]
    vocabulary = words + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(
        models.BPE({word: i for i, word in enumerate(vocabulary)}, [], byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return TokenizerWrapper(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    )


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


@pytest.mark.skipif(not MATERIAL.is_dir(), reason="shared material is absent")
@pytest.mark.parametrize("name", ["stories260K", "babyllama-char105"])
def test_real_tokenizers_stream_what_they_decode(name):
    tokenizer = mlx_lm.tokenizer_utils.load(MATERIAL / name)
    tokens = tokenizer.encode("Once upon a time, there was a little girl.\nShe said: go!")
    assert decode_tokens(tokenizer, tokens) == tokenizer.decode(tokens)


@pytest.fixture
def uncompiled():
    """Compiling a filter for the CPU takes seconds."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def frequencies(sampling, rows=20_000):
    logprobs = mx.broadcast_to(mx.log(mx.array(PROBABILITIES)), (rows, len(PROBABILITIES)))
    drawn = make_sampler(sampling)(logprobs).tolist()
    return [drawn.count(token) / rows for token in range(len(PROBABILITIES))]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 1.0}, PROBABILITIES),
        # Squares .25 .09 .0225 .0025, together .365.
        ({"temperature": 0.5}, (0.685, 0.247, 0.062, 0.007)),
        ({"temperature": 1.0, "top_k": 2}, (0.625, 0.375, 0, 0)),
        ({"temperature": 1.0, "top_p": 0.9}, (0.526, 0.316, 0.158, 0)),
        ({"temperature": 1.0, "min_p": 0.5}, (0.625, 0.375, 0, 0)),
        ({"temperature": 0.0}, (1, 0, 0, 0)),
    ],
)
def test_tokens_are_drawn_as_often_as_the_settings_say(settings, expected, uncompiled):
    seed = {"seed": 0} if settings["temperature"] else {}
    assert frequencies(Sampling(**settings, **seed)) == pytest.approx(expected, abs=0.012)


def test_each_draw_is_a_new_one():
    sample = make_sampler(Sampling(temperature=1.0, seed=0))
    flat = mx.zeros((1, 1000))
    assert len({sample(flat).item() for _ in range(20)}) > 15


def test_the_penalty_sees_tokens_that_only_the_cache_holds():
    """Penalty 2 over the last 20: +4 becomes +2, -4 becomes -8; token 2 lies 21 back."""
    [penalise] = make_logits_processors(Sampling(repetition_penalty=2.0), [2, 0, *[1] * 18])
    logits = penalise(mx.array([1], mx.uint32), mx.array([[4.0, -4.0, 4.0, 4.0]]))
    assert logits.tolist() == [[2.0, -8.0, 4.0, 4.0]]
    assert make_logits_processors(Sampling()) == []


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>"])
def test_plain_text_begins_once_and_has_no_end(sentencepiece, template):
    """A tokenizer that ends every text would end the one that is to go on."""
    inner = Tokenizer.from_str(sentencepiece.backend_tokenizer.to_str())
    inner.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    assert encode_text(tokenizer, "s.") == [0, 5, 6]
    assert encode_text(tokenizer, "<s>s.") == [0, 5, 6]


def test_plain_text_has_no_begin_token_where_the_tokenizer_writes_none():
    class Bare(SimpleNamespace):
        def encode(self, text, add_special_tokens=True):
            return [7, 8]

    assert encode_text(Bare(bos_token_id=1), "x") == [7, 8]


def test_the_context_is_read_where_a_config_has_it():
    assert context_length({"max_position_embeddings": 512}) == 512
    assert context_length({"text_config": {"max_position_embeddings": 64}}) == 64
    assert context_length({"n_positions": 1024}) == 1024  # GPT-2: a table, read without bounds
    assert context_length({"model_type": "mamba"}) is None
