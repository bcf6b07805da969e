"""Pairs on a terminal: readable by marks alone."""

import io

from rich.console import Console

from mlx_dpo.data.inspect import show as showing
from mlx_dpo.data.inspect.show import Part, Piece
from mlx_dpo.reporting.pair_view import (
    HEAD,
    MARKS,
    STYLES,
    TAIL,
    bar,
    histogram,
    print_legend,
    print_page,
    spread_lines,
)

PROMPT = Part("prompt", "prompt", 4, [Piece("<s>", True), Piece("a\nb <s>", False)])
SCORED = Part("chosen", "scored", 1, [Piece("c", False), Piece("</s>", True)])


def page(*parts, notes=(), **settings):
    out = io.StringIO()
    console = Console(file=out, width=40, highlight=False, **settings)
    print_page(console, "a:1", notes, parts)
    return out.getvalue()


def test_marks_tell_apart_what_colours_would():
    lines = page(PROMPT, SCORED, notes=["left [out]"]).splitlines()
    assert lines[0] == "" and lines[1].startswith("a:1 ─")
    assert lines[2:] == [
        "left [out]",
        "prompt, 4 tokens, read",
        "│ ⟦<s>⟧a⏎",
        "│ b <s>",
        "chosen, 1 token, scored",
        "█ c⟦</s>⟧",
    ]


def test_colours_say_the_same_where_there_are_any(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)  # as the gate sets it
    shown = page(PROMPT, SCORED, force_terminal=True, color_system="standard")
    assert "\x1b[32mc\x1b[0m" in shown  # scored: green
    assert "\x1b[1;36m⟦<s>⟧\x1b[0m" in shown  # control tokens
    assert "\x1b[1;36m⟦<s>⟧\x1b[0ma⏎" in shown  # what is read: as ever


def test_every_line_has_its_mark_where_a_terminal_folds_it():
    long = Part("chosen", "scored", 9, [Piece("word " * 20, False)])
    shown = page(long, force_terminal=True, color_system=None).splitlines()[3:]
    assert len(shown) == 3
    assert all(line.startswith("█ ") and len(line) <= 40 for line in shown)


def test_no_text_can_move_the_cursor_or_turn_the_writing_round():
    text = "\x1b[31m\r\x08\u202e\u200b [bold]x[/bold]"
    part = Part("chosen", "scored", 1, [Piece(text, False)])
    shown = page(part, soft_wrap=True).splitlines()[3]
    assert shown == "█ \\u001b[31m\\u000d\\u0008\\u202e\\u200b [bold]x[/bold]"


def test_of_a_long_cut_beginning_and_end_are_shown():
    text = "a" * HEAD + "b" * 50 + "z" * TAIL
    _, _, title, shown = page(Part("chosen", "cut", 9, [Piece(text, False)]), soft_wrap=True).split(
        "\n", 3
    )
    assert title == "chosen, 9 tokens, cut: never seen"
    assert shown == "╳ " + "a" * HEAD + " […] " + "z" * TAIL + "\n"


def test_every_kind_has_a_mark_and_a_style_and_the_legend_names_them():
    kinds = {showing.PROMPT, showing.SCORED, showing.CUT}
    assert kinds == MARKS.keys() == STYLES.keys()
    out = io.StringIO()
    print_legend(Console(file=out))
    assert all(mark in out.getvalue() for mark in MARKS.values())


def test_bars_are_as_long_as_their_share():
    assert [bar(x) for x in (0, 0.0001, 1 / 16, 1.5 / 16, 1)] == ["", "▏", "█", "█▌", "█" * 16]


def test_a_histogram_has_a_line_a_bin_and_a_column_a_part():
    lines = histogram(("prompt", "chosen"), [(1, 1, (0, 4)), (2, 3, (2, 1))], "tokens")
    assert lines == [
        "tokens  prompt              chosen",
        "     1                      ████████████████ 4",
        "   2–3  ████████ 2          ████ 1",
    ]


def test_spreads_stand_under_their_names():
    assert spread_lines({"prompt": (1, 20, 3000)}) == [
        "           median       95 %    longest",
        "prompt          1         20      3,000",
    ]
