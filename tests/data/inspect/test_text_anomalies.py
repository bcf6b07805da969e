"""Odd characters in texts."""

import pytest

from mlx_dpo.data.inspect.text_anomalies import find_odd_characters


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
