"""What `chat` and `generate` share: flags for sampling, the model they talk to, text on stdout."""

import os
import re
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

import click

from mlx_dpo.config.sampling import Sampling
from mlx_dpo.errors import ConfigError

if TYPE_CHECKING:
    from mlx_dpo.adapters.switch import AdapterState
    from mlx_dpo.chat.session import ChatSession
    from mlx_dpo.generation.stream import AnswerChunk, GenerationSummary
    from mlx_dpo.saved_runs.open import SwitchableModel

# Escape sequences in a model's text must not steer a terminal; newline and tab may stay.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

DIM, PLAIN = "\x1b[2m", "\x1b[0m"

Command = Callable[..., Any]


def model_flags(command: Command) -> Command:
    """Add `--model`, `--adapter`, `--reference`, `--system` and `--thinking`."""
    for decorate in (
        click.option(
            "--thinking/--no-thinking",
            default=None,
            help="Let a model think first that can. [default: no-thinking]",
        ),
        click.option("--system", metavar="TEXT", help="System message before everything."),
        click.option(
            "--reference", is_flag=True, help="Talk to the model without what it learned."
        ),
        click.option(
            "--adapter", metavar="FOLDER", help="Adapter on top of --model, mlx-lm's or PEFT's."
        ),
        click.option("--model", metavar="MODEL", help="A folder or Hub id, in place of a run."),
    ):
        command = decorate(command)
    return command


def sampling_flags(*, without: Sequence[str] = (), **defaults: Any) -> Callable[[Command], Command]:
    """Add a flag for each field of `Sampling` but some; `defaults` replace those declared there."""

    def decorate(command: Command) -> Command:
        for f in reversed([f for f in fields(Sampling) if f.name not in without]):
            assert f.default is not MISSING
            default = defaults.get(f.name, f.default)
            setting = f.metadata["setting"]
            command = click.option(
                "--" + f.name.replace("_", "-"),
                type=setting.type,
                default=default,
                show_default=default is not None,
                help=setting.help,
            )(command)
        return command

    return decorate


def open_chat(  # noqa: PLR0913 (one argument for each flag)
    sampling: Sampling,
    *,
    run: str | None,
    model: str | None,
    adapter: str | None,
    reference: bool,
    system: str | None,
    thinking: bool | None,
    raw: bool = False,
    context: int | None = None,
    switching: bool = False,
) -> tuple["ChatSession", "SwitchableModel"]:
    """Load what is to be talked to, say on stderr what loading had to say.

    A run is spoken to as it was trained: as plain text, thinking, or with a system message, where
    it was. Both sides are kept only for `switching`.
    """
    from mlx_dpo.chat.session import ChatSession
    from mlx_dpo.saved_runs.open import open_switchable

    one: AdapterState = "base" if reference else "aligned"
    both: tuple[AdapterState, ...] = (
        ("base", "aligned") if switching and (run or adapter) else (one,)
    )
    opened = open_switchable(run, model=model, adapter=adapter, wanted=both)
    for note in opened.notes:
        click.echo(note, err=True)
    if reference:
        opened.sides.activate("base")
    if opened.run is not None:
        raw = raw or opened.run.trained_on_text
        config = opened.run.config
        thinking = config.thinking if thinking is None and not raw else thinking
        system = config.system if system is None and not raw else system
    chat = ChatSession(
        opened.base.model,
        opened.base.tokenizer,
        sampling,
        system=system,
        thinking=thinking,
        context=_context(opened.base.config, context),
        raw=raw,
        switch=opened.sides,
    )
    return chat, opened


def _context(config: dict[str, Any], asked: int | None) -> int | None:
    """Tokens of a conversation: as many as the model places, or fewer where that is asked for."""
    from mlx_dpo.generation.generate import context_length

    most = context_length(config)
    if asked is not None and most is not None and asked > most:
        raise ConfigError(
            f"`context` is {asked}, but the model places no more than {most} tokens; "
            f"use --context {most} or less"
        )
    return most if asked is None else asked


def write(text: str) -> None:
    """Text of a model: without control characters on a terminal, exactly as it is elsewhere."""
    # click.echo would strip escape sequences from what goes into a pipe.
    sys.stdout.write(CONTROLS.sub("", text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


class Shown:
    """Answers on stdout as they come; thinking dimmed where a terminal can, or left out."""

    def __init__(self, *, hide_thinking: bool = False) -> None:
        self.hide_thinking = hide_thinking
        wants = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._dim = wants and not os.environ.get("NO_COLOR")

    def stream(self, pieces: Generator["AnswerChunk"]) -> tuple[str, "GenerationSummary"]:
        """Write an answer to its end; all of its text, and what is known of it."""
        said, answered, summary = "", "", None
        with closing(pieces):
            for piece in pieces:
                said += piece.text
                if not piece.thinking:
                    # Blank lines part an answer from what was thought before it.
                    hidden = self.hide_thinking and not answered and said != piece.text
                    text = piece.text.lstrip("\n") if hidden else piece.text
                    answered += text
                    write(text)
                elif not self.hide_thinking:
                    self._aside(piece.text)
                summary = piece.summary
        write("\n")
        assert summary is not None
        return said, summary

    def _aside(self, text: str) -> None:
        if not self._dim:
            write(text)
            return
        sys.stdout.write(DIM)
        try:
            write(text)
        finally:
            sys.stdout.write(PLAIN)
            sys.stdout.flush()


def cut_note(reason: str, max_tokens: int) -> str | None:
    """What to say of an answer that the model did not end, None if it did."""
    if reason == "length":
        return f"The answer was cut after {max_tokens} tokens (--max-tokens)."
    if reason == "context":
        return "The answer was cut: the model's context is full."
    return None
