"""Thinking at a terminal and through a pipe: shown, dimmed or hidden."""

import io
import json
from contextlib import redirect_stdout

import pytest
from click.testing import CliRunner

from mlx_dpo.cli import cli
from mlx_dpo.cli.answers import DIM, PLAIN, AnswerWriter
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
def terminal_with_colors(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


def shown(pieces=PIECES, **settings):
    """Return the text on a terminal, and the return value of `stream`."""
    with redirect_stdout(Terminal()) as screen:
        returned = AnswerWriter(**settings).stream(piece for piece in pieces)
    return screen.getvalue(), returned


def test_a_terminal_dims_the_thinking_and_nothing_else():
    screen, returned = shown()
    assert screen == f"{DIM}<think>{PLAIN}{DIM}hm{PLAIN}{DIM}</think>{PLAIN}\n\nYes\n\nno\n"
    assert returned == (TEXT, SUMMARY)


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_without_colors_gets_plain_text(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert shown()[0] == TEXT + "\n"


def test_blank_lines_after_hidden_thinking_are_removed():
    assert shown(hide_thinking=True) == ("Yes\n\nno\n", (TEXT, SUMMARY))


def test_blank_lines_without_thinking_before_them_stay():
    assert shown(PIECES[3:], hide_thinking=True)[0] == "\n\nYes\n\nno\n"


def test_thinking_cannot_contain_control_characters():
    pieces = [AnswerChunk("\x1b[31mred", True), PIECES[-1]]
    assert shown(pieces)[0] == f"{DIM}\\x1b[31mred{PLAIN}\n"


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    """A model whose template opens the thinking; two tokens of its vocabulary are the marks."""
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


def test_thinking_opened_by_the_template_can_be_hidden(thinker):
    """The random model never ends its thinking, so the visible answer is empty."""
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
