"""Characters and words that a tokenizer does not have are counted."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_dpo.data.report import PairsReport
from mlx_dpo.data.tokenization.formatting import TokenRules
from mlx_dpo.data.tokenization.tokenize import tokenize_pair
from mlx_dpo.types import PreferenceExample
from tests.data.template_families import byte_level, metaspace, unigram

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def wrapped(model, *, unk_token="<unk>", eos_token="</s>", words=False):
    tokenizer = Tokenizer(model)
    if words:
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unk_token, eos_token=eos_token, bos_token="<s>"
    )


def by_letters(unk_token="<unk>", eos_token="</s>", unknown=True):
    names = ["<s>", "</s>", *(["<unk>"] if unk_token == "<unk>" else []), *LETTERS]
    vocabulary = {name: i for i, name in enumerate(names)}
    model = models.BPE(vocabulary, [], unk_token=unk_token if unknown else None)
    return wrapped(model, unk_token=unk_token if unknown else None, eos_token=eos_token)


def tokenized(tokenizer, prompt, chosen="yes", rejected="no"):
    pair = PreferenceExample(prompt, chosen, rejected, "x:1")
    return tokenize_pair(tokenizer, pair, TokenRules(chat_template="text"))


@pytest.mark.parametrize(
    ("tokenizer", "tokens"),
    [
        (by_letters(), 3),
        (by_letters(unk_token="</s>"), 0),  # the stop token stands for unknown characters too
        (by_letters(unknown=False), 0),  # the characters vanish
    ],
    ids=["unk", "unk is the stop token", "no unk"],
)
def test_characters_without_a_token_are_found(tokenizer, tokens):
    example = tokenized(tokenizer, "the☃and", "yé☃")
    assert example.unknown_tokens == tokens
    assert example.unknown_characters == {"☃", "é"}
    assert not tokenized(tokenizer, "theand").has_unknown


@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_byte_level_and_byte_fallback_have_every_character(make):
    assert not tokenized(make("mistral"), "the ☃ and é", "日本").has_unknown


def test_a_unigram_tokenizer_without_byte_fallback_has_not():
    example = tokenized(unigram("mistral"), "the ☃ and é")
    assert (example.unknown_tokens, example.unknown_characters) == (2, {"☃", "é"})


def test_words_without_a_token_are_counted_but_their_letters_are_not_blamed():
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, "one": 3, "two": 4, "yes": 5, "no": 6}
    tokenizer = wrapped(models.WordLevel(vocabulary, unk_token="<unk>"), words=True)
    example = tokenized(tokenizer, "one two three ", "yes")
    assert (example.unknown_tokens, example.unknown_characters) == (1, frozenset())


def test_the_report_counts_pairs_and_tokens():
    report = PairsReport("x", 1024)
    for prompt in ("the☃☃", "thé", "the"):
        report.keep(tokenized(by_letters(), prompt), was_text=True)
    line = "2 pairs with characters or words that the tokenizer does not have (3 unknown tokens)"
    assert line in report.lines()


def test_a_real_tokenizer_without_byte_fallback(material):
    from mlx_lm.tokenizer_utils import load

    tokenizer = load(material / "models" / "babyllama-char105")
    assert tokenized(tokenizer, "A cat ☃ 日", "yes.").unknown_characters == {"☃", "日"}
    assert not tokenized(tokenizer, "A cat.", "yes.").has_unknown
