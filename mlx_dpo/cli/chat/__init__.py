"""`mlx-dpo chat`: chat with a model at a terminal, or line by line through a pipe."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_dpo.cli.answers import AnswerWriter, model_flags, open_chat
from mlx_dpo.cli.chat.commands import ChatCommands, asks_question, is_command, print_note
from mlx_dpo.cli.chat.feedback import FeedbackFiles
from mlx_dpo.cli.chat.prompt import (
    TypedMessage,
    edit_text,
    line_editing,
    next_message,
    read_line,
)
from mlx_dpo.cli.command import FILE, FOLDER, Command
from mlx_dpo.cli.output import echo, write_text
from mlx_dpo.cli.sampling_flags import sampling_flags
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.errors import ConfigError, DPOError

if TYPE_CHECKING:
    from mlx_dpo.chat.session import ChatSession
    from mlx_dpo.saved_runs.open import SwitchableModel


@click.command(
    cls=Command,
    examples=(
        "mlx-dpo chat run",
        "mlx-dpo chat --model ORG/MODEL --adapter adapter",
        "mlx-dpo chat --model models/tiny-chat --temperature 0 < questions.txt",
    ),
    renamed={"--reference": "use --base"},
)
@click.argument("run", required=False, type=FOLDER)
@model_flags
@click.option("--hide-thinking", is_flag=True, help="Show answers without their thinking.")
@click.option(
    "--context",
    type=click.IntRange(min=2),
    help="Context window in tokens.",
    show_default="the model's maximum",
)
@click.option(
    "--pairs",
    type=FILE,
    default="chat-pairs.jsonl",
    metavar="FILE",
    help="File to which /edit and /compare write pairs.",
)
@click.option(
    "--judged",
    type=FILE,
    default="chat-judged.jsonl",
    metavar="FILE",
    help="File to which /good and /bad write labelled answers.",
)
@click.option("--whole", is_flag=True, help="Through a pipe: take all of stdin as one question.")
@click.option(
    "--conversation",
    is_flag=True,
    help="Through a pipe: take the lines as turns of one conversation.",
)
@sampling_flags(temperature=0.7)
def chat(
    run: str | None,
    hide_thinking: bool,
    pairs: str,
    judged: str,
    whole: bool,
    conversation: bool,
    **settings: Any,
) -> None:
    """Chat with the policy of a RUN, with its reference, or with a model.

    `/help` lists the commands: switch between the base and the aligned model, compare their
    answers, undo turns, and save labelled or edited answers as training data for `train`.

    Through a pipe each line of stdin is a question of its own and gets one answer on stdout;
    with --conversation the lines are turns of one conversation. Everything else goes to stderr. At
    a terminal the typed lines are saved for the next
    chat, in `chat-history` in the cache folder.
    """
    from mlx_dpo.chat.feedback import JsonlFile

    at_terminal = sys.stdin.isatty()
    _check_pipe_flags(at_terminal, whole=whole, conversation=conversation)
    given = {
        name: settings.pop(name)
        for name in ("model", "adapter", "reference", "system", "thinking", "context")
    }
    files = JsonlFile(Path(pairs)), JsonlFile(Path(judged))
    session, opened = open_chat(Sampling(**settings), run=run, switching=True, **given)
    if hide_thinking and not opened.base.tokenizer.has_thinking:
        raise ConfigError("`hide_thinking` has no effect; the model has no thinking mode")
    feedback = FeedbackFiles(*files, session, opened)
    writer = AnswerWriter(hide_thinking=hide_thinking)
    if session.raw:
        print_note("No chat template is used: your text is continued as plain text.")
    if at_terminal:
        _run_at_terminal(ChatCommands(feedback, writer, pick=_ask_choice, edit=_ask_edit), opened)
    else:
        _run_through_pipe(ChatCommands(feedback, writer), whole=whole, conversation=conversation)


def _check_pipe_flags(at_terminal: bool, *, whole: bool, conversation: bool) -> None:
    """Raise `ConfigError` if a flag for stdin that is no terminal has no effect."""
    for name, value in (("whole", whole), ("conversation", conversation)):
        if value and at_terminal:
            raise ConfigError(f"`--{name}` has no effect at a terminal; pipe the questions in")
    if whole and conversation:
        raise ConfigError("`--conversation` has no effect together with `--whole`")


def _run_at_terminal(commands: ChatCommands, opened: "SwitchableModel") -> None:
    for note in [*_header(commands.chat, opened), *commands.feedback.repair()]:
        print_note(note)
    print_note("/help lists the commands, Ctrl-D leaves.")
    with line_editing():
        while (message := next_message(_prompt(commands.chat))) is not None:
            if not _run_turn(commands, message):
                break
    print_note("\nGoodbye")


def _header(session: "ChatSession", opened: "SwitchableModel") -> Iterator[str]:
    name = opened.base.source
    if opened.adapter is not None:
        name += f" with the adapter of {opened.adapter}"
    if session.context is not None:
        name += f"; context {session.context:,} tokens"
    yield name
    if session.system is not None:
        yield f"System message: {session.system}"


def _prompt(session: "ChatSession") -> str:
    """Return the input prompt, which names the model if there are two: `base> ` or `aligned> `."""
    return f"{session.switch.active}> " if session.switch.can_switch else "> "


def _run_turn(commands: ChatCommands, message: TypedMessage) -> bool:
    """Answer a typed message or run the command in it; return False to leave the chat."""
    text = message.text
    try:
        if is_command(text) and not message.is_block:
            return commands.run(text)
        if text.startswith("/") and text[1:].isalpha() and not message.is_block:
            print_note(f"Unknown command `{text}`; /help lists them")
        elif text.strip():
            commands.answer(text)
    except KeyboardInterrupt:
        write_text("\n")
        print_note("Stopped.")
    except DPOError as error:
        echo(f"Error: {error}", err=True)
    return True


def _ask_choice(question: str) -> str | None:
    try:
        return read_line(question)
    except (EOFError, KeyboardInterrupt):
        print_note("")
        return None


def _ask_edit(answer: str) -> str | None:
    return edit_text("Better answer: ", answer)


def _run_through_pipe(commands: ChatCommands, *, whole: bool, conversation: bool) -> None:
    """Answer the lines of stdin: each alone, or as turns of one `conversation`.

    A command refers to the question before it.
    """
    if not whole:
        print_note(
            "The lines of stdin are turns of one conversation."
            if conversation
            else "Each line of stdin is a question of its own (--conversation: turns of one)."
        )
    for number, line in _read_all() if whole else _read_lines():
        if not conversation and asks_question(line):
            commands.chat.reset()
        if is_command(line) and not whole:
            if not commands.run(line):
                return
        elif line:
            commands.answer(line)
        else:
            print_note(f"stdin:{number}: the line is empty; no answer")


def _read_lines() -> Iterator[tuple[int, str]]:
    for number, line in enumerate(sys.stdin.buffer, start=1):
        yield number, _decode(line, f"stdin:{number}: the line").strip()


def _read_all() -> Iterator[tuple[int, str]]:
    yield 1, _decode(sys.stdin.buffer.read(), "stdin: the text").removesuffix("\n")


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{name} is not UTF-8; convert the text") from None
