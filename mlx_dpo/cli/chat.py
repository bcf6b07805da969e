"""`mlx-dpo chat`: a conversation at a terminal, or line by line through a pipe."""

import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

import click

from mlx_dpo.cli._answers import (
    cut_note,
    model_flags,
    open_chat,
    sampling_flags,
    write,
)
from mlx_dpo.errors import ConfigError, DPOError
from mlx_dpo.policy.sampling import Sampling

if TYPE_CHECKING:
    from mlx_dpo.conversation.chat import Chat, Summary

HELP = """\
/help   this list
/reset  start over
/exit   leave, as Ctrl-D does
Ctrl-C stops an answer; at the prompt it leaves."""


@click.command()
@click.argument("run", required=False)
@model_flags
@sampling_flags(temperature=0.7)
def chat(
    run: str | None,
    model: str | None,
    reference: bool,
    system: str | None,
    thinking: bool | None,
    **settings: Any,
) -> None:
    """Talk to the policy of a RUN, to its reference, or to a model.

    Through a pipe each line of stdin gets one answer on stdout; everything else goes to stderr.

    \b
    mlx-dpo chat run
    mlx-dpo chat run --reference            the same model without what it learned
    mlx-dpo chat --model models/tiny-chat --temperature 0 < questions.txt
    """
    session, _ = open_chat(
        Sampling(**settings),
        run=run,
        model=model,
        reference=reference,
        system=system,
        thinking=thinking,
    )
    if session.raw:
        _say("No chat template is used: what you write is continued as plain text.")
    if sys.stdin.isatty():
        _at_terminal(session)
    else:
        _through_pipe(session)


def _at_terminal(session: "Chat") -> None:
    with suppress(ImportError):
        import readline  # noqa: F401  # line editing and history for input()
    _say("/help lists the commands, Ctrl-D leaves.")
    with suppress(EOFError, KeyboardInterrupt):
        while _turn(session, _ask()):
            pass
    _say("\nGoodbye")


def _ask() -> str:
    if sys.stdout.isatty():
        return input("> ")  # readline must know the prompt to redraw the line
    click.echo("> ", err=True, nl=False)
    return input()


def _turn(session: "Chat", line: str) -> bool:
    """One turn at the terminal; False to leave."""
    line = line.strip()
    if line == "/exit":
        return False
    if _is_command(line):
        _obey(session, line)
    elif line:
        try:
            summary = _answer(session, line)
            _say(_report(summary))
        except KeyboardInterrupt:
            write("\n")
            _say("Stopped.")
        except DPOError as error:
            _say(f"Error: {error}")
    return True


def _through_pipe(session: "Chat") -> None:
    for number, line in _lines():
        if line == "/exit":
            return
        if _is_known(line):
            _obey(session, line)
        elif line:
            _answer(session, line)
        else:
            _say(f"stdin:{number}: the line is empty; no answer")


def _lines() -> Iterator[tuple[int, str]]:
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            yield number, line.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise ConfigError(f"stdin:{number}: the line is not UTF-8; convert the text") from None


def _is_command(line: str) -> bool:
    return line.startswith("/") and line[1:].isalpha()


def _is_known(line: str) -> bool:
    return line in ("/help", "/reset", "/exit")


def _obey(session: "Chat", command: str) -> None:
    if command == "/help":
        _say(HELP)
    elif command == "/reset":
        session.reset()
        _say("Started over.")
    else:
        _say(f"Unknown command `{command}`; /help lists them")


def _answer(session: "Chat", text: str) -> "Summary":
    summary = None
    with closing(session.reply(text)) as pieces:
        for piece in pieces:
            write(piece.text)
            summary = piece.summary
    write("\n")
    assert summary is not None
    if note := cut_note(summary.finish_reason, session.sampling.max_tokens):
        _say(note)
    return summary


def _report(summary: "Summary") -> str:
    rate = summary.tokens_per_second
    speed = "" if rate is None else f", {rate:.0f} a second"
    return f"({summary.tokens} tokens{speed})"


def _say(line: str) -> None:
    click.echo(line, err=True)
