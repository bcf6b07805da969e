"""Thinking at a terminal and through a pipe: shown, dimmed or hidden."""

import io
import json
from contextlib import redirect_stdout

import pytest
from click.testing import CliRunner

from mlx_dpo.cli import cli
from mlx_dpo.cli.answers import DIM, PLAIN, Shown
from mlx_dpo.generation.stream import AnswerChunk, GenerationSummary
from tests.checkpoints import make_checkpoint

SUMMARY = GenerationSummary(3, "stop", 5, 0, 0.1, 9.0)
PIECES = [
    AnswerChunk("<think>", True), AnswerChunk("hm", True), AnswerChunk("</think>", True),
    AnswerChunk("\n"), AnswerChunk("\nYes"), AnswerChunk("\n\nno"),
    AnswerChunk("", summary=SUMMARY),
]  # fmt: skip
TEXT = "<think>hm</think>\n\nYes\n\nno"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def wants_colours(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


def shown(pieces=PIECES, **settings):
    """What stands on a terminal, and what `stream` returns."""
    with redirect_stdout(Terminal()) as screen:
        returned = Shown(**settings).stream(piece for piece in pieces)
    return screen.getvalue(), returned


def test_a_terminal_dims_what_is_thought_and_nothing_else():
    screen, returned = shown()
    assert screen == f"{DIM}<think>{PLAIN}{DIM}hm{PLAIN}{DIM}</think>{PLAIN}\n\nYes\n\nno\n"
    assert returned == (TEXT, SUMMARY)


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_that_wants_no_colours_gets_the_text_alone(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert shown()[0] == TEXT + "\n"


def test_hidden_thinking_takes_the_blank_lines_behind_it_along():
    assert shown(hide_thinking=True) == ("Yes\n\nno\n", (TEXT, SUMMARY))


def test_blank_lines_that_follow_no_thinking_stay():
    assert shown(PIECES[3:], hide_thinking=True)[0] == "\n\nYes\n\nno\n"


def test_what_is_thought_does_not_steer_the_terminal():
    pieces = [AnswerChunk("\x1b[31mred", True), PIECES[-1]]
    assert shown(pieces)[0] == f"{DIM}[31mred{PLAIN}\n"


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    """Its template begins to think for it; two letters of its vocabulary are the marks."""
    folder = make_checkpoint(tmp_path_factory.mktemp("thinker"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    for letter, mark in (("!", "<think>"), ("?", "</think>")):
        number = vocabulary.pop(letter)
        vocabulary[mark] = number
        tokenizer["added_tokens"].append(
            {"id": number, "content": mark, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False, "special": False}
        )  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    template = (folder / "chat_template.jinja").read_text()
    opens = "{% if add_generation_prompt and enable_thinking %}<think>{% endif %}"
    (folder / "chat_template.jinja").write_text(template + opens)
    return str(folder)


def test_what_is_thought_within_a_mark_of_the_template_can_be_hidden(thinker):
    """The random model never ends its thinking, so that nothing is left of its answer."""
    shown, hidden, off = (
        CliRunner().invoke(
            cli,
            ["chat", "--model", thinker, "--temperature", "0", "--max-tokens", "6", *flags],
            input="cat\n",
        )
        for flags in (["--thinking"], ["--thinking", "--hide-thinking"], ["--hide-thinking"])
    )
    assert [result.exit_code for result in (shown, hidden, off)] == [0, 0, 0]
    assert len(shown.stdout) > 3
    assert hidden.stdout == "\n"
    assert len(off.stdout) > 3
