import json

import pytest

from mlx_dpo.terminal_text import escape_controls, escape_invisible, escape_json, escape_line

ORDINARY = "Grüße, 日本 👩‍🌾 «naïve» [bold] :train: \\ ünï a\u0301 العربية"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b]0;title\x07", r"\x1b[31mred\x1b]0;title\x07"),
        ("\x9b2J\x90q\x85", r"\x9b2J\x90q\x85"),  # C1: the same in one character
        ("a\rb\x08\x7f\x00", r"a\rb\x08\x7f\x00"),
        ("\u202egpj.exe\u2066\u2069", r"\u202egpj.exe\u2066\u2069"),
        ("a\u2028b\u2029", r"a\u2028b\u2029"),
        ("half \ud83d, raw byte \udcff", r"half \ud83d, raw byte \udcff"),
    ],
)
def test_controls_are_visible(text, shown):
    assert escape_controls(text) == escape_line(text) == escape_invisible(text) == shown
    shown.encode()  # any output can write it


def test_ordinary_text_and_its_lines_stay():
    assert escape_controls(f"{ORDINARY}\n\tx") == f"{ORDINARY}\n\tx"
    assert escape_line(f"{ORDINARY}\n\tx") == rf"{ORDINARY}\n\tx"


def test_characters_without_width_are_shown_where_they_matter():
    assert escape_invisible("a\u200bb\ufeff\u00ad") == r"a\u200bb\ufeff\xad"
    assert escape_controls("a\u200bb") == "a\u200bb"


def test_json_keeps_its_value():
    value = {"a\x7f": "\x1b\x9b\u202e\u2028\n\t\ud83d", "b": ORDINARY}
    document = escape_json(json.dumps(value, ensure_ascii=False))
    assert json.loads(document) == value
    assert ORDINARY.replace("\\", "\\\\") in document
    assert escape_controls(document) == document
