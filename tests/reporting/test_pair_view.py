"""Terminal views of pairs and lengths; marks alone are enough to read them."""

import io

from mlx_dpo.data.inspect import segments
from mlx_dpo.data.inspect.segments import Segment, TokenText
from mlx_dpo.reporting.pair_view import (
    HEAD,
    MARKS,
    STYLES,
    TAIL,
    format_bar,
    format_histogram,
    format_length_summary,
    print_legend,
    print_pair,
)
from mlx_dpo.reporting.terminal.console import TerminalConsole

PROMPT = Segment("prompt", "prompt", 4, [TokenText("<s>", True), TokenText("a\nb <s>", False)])
SCORED = Segment("chosen", "scored", 1, [TokenText("c", False), TokenText("</s>", True)])


def shown_pair(*parts, notes=(), **settings):
    out = io.StringIO()
    console = TerminalConsole(file=out, width=40, **settings)
    print_pair(console, "a:1", notes, parts)
    return out.getvalue()


def test_every_line_of_text_has_a_mark():
    lines = shown_pair(PROMPT, SCORED, notes=["left [out]"]).splitlines()
    assert lines[0] == "" and lines[1].startswith("a:1 ─")
    assert lines[2:] == [
        "left [out]",
        "prompt, 4 tokens, not scored",
        "│ ⟦<s>⟧a⏎",
        "│ b <s>",
        "chosen, 1 token, scored",
        "█ c⟦</s>⟧",
    ]


def test_a_terminal_shows_colours_as_well(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)  # the test script sets it
    shown = shown_pair(PROMPT, SCORED, force_terminal=True, color_system="standard")
    assert "\x1b[32mc\x1b[0m" in shown  # scored: green
    assert "\x1b[1;36m⟦<s>⟧\x1b[0m" in shown  # special tokens
    assert "\x1b[1;36m⟦<s>⟧\x1b[0ma⏎" in shown  # the prompt has the default colour


def test_wrapped_lines_have_a_mark_each():
    long = Segment("chosen", "scored", 9, [TokenText("word " * 20, False)])
    shown = shown_pair(long, force_terminal=True, color_system=None).splitlines()[3:]
    assert len(shown) == 3
    assert all(line.startswith("█ ") and len(line) <= 40 for line in shown)


def test_control_characters_are_escaped():
    text = "\x1b[31m\r\x08\u202e\u200b [bold]x[/bold]"
    part = Segment("chosen", "scored", 1, [TokenText(text, False)])
    shown = shown_pair(part, soft_wrap=True).splitlines()[3]
    assert shown == "█ \\x1b[31m\\r\\x08\\u202e\\u200b [bold]x[/bold]"


def test_a_long_cut_text_is_shown_by_its_beginning_and_end():
    text = "a" * HEAD + "b" * 50 + "z" * TAIL
    _, _, title, shown = shown_pair(
        Segment("chosen", "cut", 9, [TokenText(text, False)]), soft_wrap=True
    ).split("\n", 3)
    assert title == "chosen, 9 tokens, cut: not in the model's input"
    assert shown == "╳ " + "a" * HEAD + " […] " + "z" * TAIL + "\n"


def test_every_treatment_has_a_mark_a_style_and_a_legend():
    kinds = {segments.PROMPT, segments.SCORED, segments.CUT}
    assert kinds == MARKS.keys() == STYLES.keys()
    out = io.StringIO()
    print_legend(TerminalConsole(file=out))
    assert all(mark in out.getvalue() for mark in MARKS.values())


def test_the_width_of_a_bar_is_proportional_to_its_share():
    assert [format_bar(x) for x in (0, 0.0001, 1 / 16, 1.5 / 16, 1)] == [
        "",
        "▏",
        "█",
        "█▌",
        "█" * 16,
    ]


def test_a_histogram_has_a_line_per_bin_and_a_column_per_part():
    lines = format_histogram(("prompt", "chosen"), [(1, 1, (0, 4)), (2, 3, (2, 1))], "tokens")
    assert lines == [
        "tokens  prompt              chosen",
        "     1                      ████████████████ 4",
        "   2–3  ████████ 2          ████ 1",
    ]


def test_the_length_summary_has_a_row_per_part():
    assert format_length_summary({"prompt": (1, 20, 3000)}) == [
        "           median       95 %    longest",
        "prompt          1         20      3,000",
    ]
