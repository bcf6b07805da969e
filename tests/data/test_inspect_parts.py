"""The parts of a check by themselves: characters, refusals, places, digests, lengths."""

import tracemalloc

import pytest

from mlx_dpo.data.files import RowLocations
from mlx_dpo.data.inspect.duplicates import ExampleDigests
from mlx_dpo.data.inspect.findings import MAX_DETAILS, OTHER_DETAILS, FindingLog
from mlx_dpo.data.inspect.lengths import Bin, Lengths, LengthSummary
from mlx_dpo.data.inspect.text_anomalies import find_odd_characters, find_refusal
from mlx_dpo.types import PreferenceExample

PARTS = ("prompt", "chosen", "rejected")


def names(text):
    return [name for name, _ in find_odd_characters([text])]


@pytest.mark.parametrize(
    "good", ["naïve café", "„Groß“ – „SPAẞ“", "À À LA CARTE", "NÃO", "20 °C", "â", "ðe", "¡Sí!",
             "你好，世界", "سلام‌علیکم", "👩‍👩‍👧‍👦 ✓", "a\tb\r\nc", "MAÇÃ”"]
)  # fmt: skip
def test_correct_text_of_many_languages_has_no_odd_characters(good):
    assert names(good) == []


@pytest.mark.parametrize("good", ["café", "Ünïcode", "“quoted”", "it’s — so", "½ °", "🙂"])
@pytest.mark.parametrize("wrong", ["latin-1", "cp1252"])
def test_utf8_decoded_with_another_encoding_is_found(good, wrong):
    try:
        text = good.encode().decode(wrong)
    except UnicodeDecodeError:  # Windows-1252 has no character for five bytes
        text = good.encode().decode(wrong, "replace").replace("\ufffd", "\x9d")
    assert names(text)[0] == "mojibake"


def test_half_of_a_garbled_character_is_no_second_finding():
    assert names("—".encode().decode("latin-1")) == ["mojibake"]
    assert names("— \x02".encode().decode("latin-1")) == ["mojibake", "control-character"]


def test_characters_are_reported_as_code_points_and_shown_if_printable():
    assert list(find_odd_characters(["a\x00b\x00c\x1b", "fÃ©e"])) == [
        ("mojibake", ["U+00C3 U+00A9 (Ã©)"]),
        ("control-character", ["U+0000", "U+001B"]),
    ]


def test_a_joiner_between_latin_letters_is_debris():
    assert names("a\u200db") == ["invisible-character"]
    assert names("a \u200db") == []


@pytest.mark.parametrize(
    ("answer", "phrase"),
    [
        ("I cannot help.", "i cannot"),
        ("  **I can't** do that", "i can't"),
        ("As an AI, I have no feelings.", "as an ai"),
        ("Well. As an AI language model, no.", "as an ai language model"),
        ("As an aide to the king", None),
        ("He said: I cannot", None),
        ("I can", None),
        ("x" * 300 + "as an ai language model", None),
    ],
)
def test_the_phrase_of_a_refusal_is_returned(answer, phrase):
    assert find_refusal(answer) == phrase


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I’m sorry, I cannot do this.", True),
        ("As an AI language model, I have no body.", True),
        ("I am not able to say.", True),
        ("Sorry to hear that! I am sorry for your loss.", False),
        ("Thank you for asking. I won't do that.", True),
        ("I am afraid that I have no answer.", True),
        ("I can do that.", False),
        ("Cats cannot fly.", False),
        ("Here is the poem you asked for, with all of its lines and their rhymes, which end "
         "in: I cannot", False),
    ],
)  # fmt: skip
def test_a_refusal_begins_a_sentence_near_the_start(text, refusal):
    assert (find_refusal(text) is not None) is refusal


def test_locations_are_restored_unchanged():
    names = ["a.jsonl:1", "a.jsonl:2", "a[0]", "b 3[17]", "x:007", "none", "", "a[1] and a[3]", "5"]
    names += ["9" * 30, "a.jsonl:1"]
    places = RowLocations()
    assert [places[places.add(name)] for name in names] == names


def test_a_repeated_location_is_stored_once():
    places = RowLocations()
    assert [places.add(name) for name in ("a:1", "a:1", "a:2", "a:1")] == [0, 0, 1, 2]


def test_a_million_locations_and_digests_would_fit_into_70_megabytes():
    places, digests = RowLocations(), ExampleDigests()
    pair = PreferenceExample("p", "c" * 100, "r" * 100, "x")
    tracemalloc.start()
    for i in range(5000):
        digests.add(pair, places.add(f"a-rather-long-name-of-a-file-of-pairs.jsonl:{i}"))
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < 5000 * 70


def test_details_beyond_the_maximum_are_counted_together():
    log = FindingLog(RowLocations())
    for i in range(MAX_DETAILS + 5):
        log.add_detail("unreadable", f"message {i}")
    log.add_detail("unreadable", "message 0")
    assert len(log.details["unreadable"]) == MAX_DETAILS + 1
    assert log.details["unreadable"][OTHER_DETAILS] == 5
    assert log.details["unreadable"]["message 0"] == 2


def lengths(*rows):
    found = Lengths("tokens", PARTS)
    for row in rows:
        found.add(*row)
    return found


def test_quantiles_are_lengths_of_the_data():
    found = lengths(*((i, 2 * i, 7) for i in range(1, 101)))
    # Of 1 to 100 the median lies between 50 and 51; the longer one is said.
    assert found.summaries() == {
        "prompt": LengthSummary(51, 96, 100),
        "chosen": LengthSummary(102, 192, 200),
        "rejected": LengthSummary(7, 7, 7),
    }


def test_bins_double_and_contain_every_length_once():
    found = lengths((0, 1, 2), (3, 4, 7), (8, 2, 2))
    assert found.histogram() == [
        Bin(0, 0, (1, 0, 0)), Bin(1, 1, (0, 1, 0)), Bin(2, 3, (1, 1, 2)), Bin(4, 7, (0, 1, 1)),
        Bin(8, 15, (1, 0, 0)),
    ]  # fmt: skip


def test_length_bias_by_hand():
    """Of 4, 1, 2 and 1, 1, 3: chosen longer, equal, rejected longer.

    The six lengths 4 1 2 1 1 3 have mean 2 and variance 8/6; being chosen has 1/4. Their
    covariance is (7 - 5) / 6 / 2 = 1/6, so r = (1/6) / sqrt(8/6 / 4) = 0.2887.
    """
    bias = lengths((0, 4, 1), (0, 1, 1), (0, 2, 3)).bias()
    assert (bias.pairs, bias.chosen_longer, bias.rejected_longer) == (3, 1, 1)
    assert bias.correlation == pytest.approx(0.288675, abs=1e-6)
    assert bias.accuracy == 0.5
    assert not bias.is_significant


def test_a_length_bias_of_all_pairs_is_significant():
    bias = lengths(*[(0, 1, 2)] * 10).bias()
    assert (bias.accuracy, bias.correlation, bias.is_significant) == (1.0, -1.0, True)
    assert not lengths(*[(0, 1, 2)] * 9).bias().is_significant


def test_constant_lengths_have_no_correlation():
    assert lengths((1, 5, 5), (2, 5, 5)).bias().correlation is None


def test_unpaired_examples_have_no_length_bias():
    found = Lengths("tokens", ("prompt", "answer"))
    found.add(1, 2)
    assert found.bias() is None
    assert found.to_dict()["answer"] == {"median": 2, "most": 2, "longest": 2}
