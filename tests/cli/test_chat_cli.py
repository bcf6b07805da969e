import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import mlx.core as mx
import mlx_lm
import pytest
from click.testing import CliRunner

from mlx_dpo.cli import cli
from mlx_dpo.conversation.chat import Chat
from mlx_dpo.policy.sampling import Sampling
from tests.checkpoints import END, make_checkpoint

GREEDY = ("--temperature", "0")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("chat")))


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A model whose likeliest token is never the one that ends an answer."""
    folder = make_checkpoint(tmp_path_factory.mktemp("endless"), max_position_embeddings=10**6)
    weights = mx.load(str(folder / "model.safetensors"))
    weights["lm_head.weight"][END] = 0.0
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    return str(folder)


def answers(model, questions, tokens=6):
    """What a session says, computed without the command line."""
    chat = Chat(*mlx_lm.load(model), Sampling(max_tokens=tokens))
    return ["".join(piece.text for piece in chat.reply(question)) for question in questions]


def pipe(model, stdin, *arguments):
    flags = ["--model", model, "--max-tokens", "6", *GREEDY, *arguments]
    return CliRunner().invoke(cli, ["chat", *flags], input=stdin)


def test_through_a_pipe_each_line_gets_its_answer_within_one_conversation(model):
    questions = ["Where is the cat?", "and the hat", "no"]
    result = pipe(model, "\n".join(questions))
    assert result.exit_code == 0
    assert result.stdout == "".join(f"{answer}\n" for answer in answers(model, questions))
    assert answers(model, questions)[1:] != [answers(model, [q])[0] for q in questions[1:]]


def test_commands_work_through_a_pipe_and_are_not_sent_to_the_model(model):
    result = pipe(model, "cat\n/reset\n/help\n/etc\n\nhat\n/exit\nnever read\n")
    said = answers(model, ["cat"]) + answers(model, ["/etc", "hat"])
    assert result.exit_code == 0
    assert result.stdout == "".join(f"{answer}\n" for answer in said)
    notes = [line for line in result.stderr.splitlines() if "was cut" not in line]
    assert [n for n in notes if n.startswith(("Started", "Unknown", "stdin"))] == [
        "Started over.",
        "stdin:5: the line is empty; no answer",
    ]
    assert "/reset  start over" in notes


def test_a_line_that_is_not_text_ends_a_pipe_with_one_line(model):
    result = pipe(model, b"cat\n\xff\n")
    assert result.exit_code == 1
    assert result.stdout == answers(model, ["cat"])[0] + "\n"
    assert result.stderr.splitlines()[-1] == (
        "Error: stdin:2: the line is not UTF-8; convert the text"
    )


def test_a_full_context_ends_a_pipe_with_one_line(model):
    result = pipe(model, "word " * 600 + "\nnever asked\n")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "leave no room for an answer" in result.stderr.splitlines()[-1]


def test_a_model_without_a_template_says_that_it_continues_text(model, tmp_path):
    folder = make_checkpoint(tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    result = pipe(str(folder), "The cat\n")
    assert "continued as plain text" in result.stderr
    chat = Chat(*mlx_lm.load(model), Sampling(max_tokens=6), raw=True)
    assert result.stdout == "".join(p.text for p in chat.reply("The cat")) + "\n"


def test_a_run_or_a_model_must_be_named():
    result = CliRunner().invoke(cli, ["chat"])
    assert result.exit_code == 1
    assert result.stderr == "Error: name a run folder or a --model, and only one of them\n"


class Session:
    """`mlx-dpo chat` under a terminal of its own."""

    def __init__(self, *arguments):
        self.seen, self._screen = "", b""
        self._master, terminal = pty.openpty()
        self._child = subprocess.Popen(
            [sys.executable, "-c", "from mlx_dpo.cli import main; main()", "chat", *arguments],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            env=os.environ | {"TERM": "dumb", "INPUTRC": os.devnull},
            preexec_fn=_own_terminal,
        )
        os.close(terminal)

    def until(self, pattern, seconds=60):
        """Read on until `pattern` appears after what was seen before; returns what came."""
        deadline = time.monotonic() + seconds
        start = len(self.seen)
        while not (found := re.search(pattern, self.seen[start:])):
            assert time.monotonic() < deadline, f"{pattern!r} not in {self.seen[start:]!r}"
            self._read(0.2)
        return self.seen[start : start + found.end()]

    def _read(self, seconds):
        if select.select([self._master], [], [], seconds)[0]:
            try:
                self._screen += os.read(self._master, 4096)
            except OSError:  # Linux says so when the other side has closed
                return
            self.seen = self._screen.decode("utf-8", "ignore").replace("\r\n", "\n")

    def type(self, text):
        os.write(self._master, text.encode())

    def exit_code(self):
        code = None
        while code is None:
            self._read(0.05)
            code = self._child.poll()
        return code

    def close(self):
        self._child.kill()
        self._child.wait()
        os.close(self._master)


def _own_terminal():
    """Make the terminal the controlling one, so that Ctrl-C reaches the child as a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def session():
    opened = []

    def open_session(*arguments):
        opened.append(Session(*arguments))
        return opened[-1]

    yield open_session
    for each in opened:
        each.close()


def test_a_session_at_a_terminal(endless, session):
    """An answer streams, Ctrl-C stops it, the next is answered, Ctrl-D leaves."""
    chat = session("--model", endless, "--max-tokens", "100000", *GREEDY)
    chat.until("Ctrl-D leaves\\.\n> ")
    chat.type("Where is the cat?\n")
    chat.until("cat\\?\n(.|\n){40}")  # the answer has begun
    chat.type("\x03")
    chat.until("Stopped\\.\n> ")
    chat.type("/reset\n")
    chat.until("Started over\\.\n> ")
    chat.type("no\n")
    chat.until("no\n(.|\n){40}")
    chat.type("\x03")
    chat.until("Stopped\\.\n> ")
    chat.type("\x04")
    chat.until("Goodbye\n")
    assert chat.exit_code() == 0
    written = chat.seen.replace("^C", "").replace("^D", "")
    assert not re.search(r"[\x00-\x07\x0b-\x0c\x0e-\x1f\x7f-\x9f]", written)


def test_ctrl_c_at_the_prompt_leaves_in_peace(model, session):
    chat = session("--model", model, "--max-tokens", "4", *GREEDY)
    chat.until("> ")
    chat.type("hi\n")
    chat.until(r"\(4 tokens, \d+ a second\)\n> ")
    time.sleep(0.5)  # Python draws the prompt just before it listens for signals
    chat.type("\x03")
    chat.until("Goodbye\n")
    assert chat.exit_code() == 0
