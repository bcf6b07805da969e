"""Code that `chat` and `generate` share: model flags, loading a model, and printing its text."""

import sys
from collections.abc import Callable, Generator
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from mlx_dpo.cli.command import FOLDER
from mlx_dpo.cli.output import can_style, echo, write_style, write_text
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.errors import ConfigError

if TYPE_CHECKING:
    from mlx_dpo.adapters.switch import AdapterState
    from mlx_dpo.chat.session import ChatSession
    from mlx_dpo.generation.stream import AnswerChunk, GenerationSummary
    from mlx_dpo.saved_runs.open import SwitchableModel

DIM, PLAIN = "\x1b[2m", "\x1b[0m"

Command = Callable[..., Any]


def model_flags(command: Command) -> Command:
    """Add to a command the flags that choose the model and the chat settings.

    The flags are `--model`, `--adapter`, `--base`, `--system` and `--thinking`.
    """
    for decorate in (
        thinking_flag,
        click.option(
            "--system",
            metavar="MESSAGE",
            help="System message of the conversation.",
            show_default="that of the run",
        ),
        click.option(
            "--base",
            "reference",
            is_flag=True,
            help="Answer with the base model, without the adapter.",
        ),
        model_and_adapter_flags,
    ):
        command = decorate(command)
    return command


def model_and_adapter_flags(command: Command) -> Command:
    """Add the flags `--model` and `--adapter` to a command that takes a run or a model."""
    for decorate in (
        click.option(
            "--adapter",
            type=FOLDER,
            metavar="FOLDER",
            help="Adapter to load on top of --model, in mlx-lm's or PEFT's format.",
        ),
        click.option(
            "-m",
            "--model",
            type=FOLDER,
            metavar="MODEL",
            help="Model instead of a run: a folder or a Hub id.",
        ),
    ):
        command = decorate(command)
    return command


def thinking_flag(command: Command) -> Command:
    """Add the flag `--thinking` to a command that generates answers."""
    return click.option(
        "--thinking/--no-thinking",
        default=None,
        help="Enable thinking mode, if the model has one.",
        show_default="as in the run, else off",
    )(command)


def open_chat(  # noqa: PLR0913 (one argument per flag)
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
    """Load a run or a model and start a chat session; print notes about loading on stderr.

    A run has the chat format that it was trained with: plain text, thinking or a system message.
    Both the base and the aligned weights are loaded only if `switching` is true.
    """
    from mlx_dpo.chat.session import ChatSession
    from mlx_dpo.saved_runs.open import open_switchable

    state: AdapterState = "base" if reference else "aligned"
    wanted: tuple[AdapterState, ...] = (
        ("base", "aligned") if switching and (run or adapter) else (state,)
    )
    opened = open_switchable(run, model=model, adapter=adapter, wanted=wanted)
    for note in opened.notes:
        echo(note, err=True)
    if reference:
        opened.switch.activate("base")
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
        context=_context_length(opened.base.config, context),
        raw=raw,
        switch=opened.switch,
    )
    return chat, opened


def _context_length(config: dict[str, Any], requested: int | None) -> int | None:
    """Return the context length of a chat in tokens: the requested one, or else the model's.

    Raises:
        ConfigError: the requested length is above the model's.
    """
    from mlx_dpo.generation.context import context_length

    longest = context_length(config)
    if requested is not None and longest is not None and requested > longest:
        raise ConfigError(
            f"`context` is {requested}, but the model's context length is {longest} tokens; use "
            f"--context {longest} or less"
        )
    return longest if requested is None else requested


class AnswerWriter:
    """A writer of streamed answers to stdout, with the thinking dimmed or hidden."""

    def __init__(self, *, hide_thinking: bool = False) -> None:
        self.hide_thinking = hide_thinking
        self._dim = can_style(sys.stdout)

    def stream(self, chunks: Generator["AnswerChunk"]) -> tuple[str, "GenerationSummary"]:
        """Write a streamed answer; return the text and a summary (token counts and speed)."""
        full_text, answer, summary = "", "", None
        with closing(chunks):
            for chunk in chunks:
                full_text += chunk.text
                if not chunk.thinking:
                    # Drop the blank lines between hidden thinking and the answer.
                    after_hidden = self.hide_thinking and not answer and full_text != chunk.text
                    text = chunk.text.lstrip("\n") if after_hidden else chunk.text
                    answer += text
                    write_text(text)
                elif not self.hide_thinking:
                    self._write_dimmed(chunk.text)
                summary = chunk.summary
        write_text("\n")
        assert summary is not None
        return full_text, summary

    def _write_dimmed(self, text: str) -> None:
        if not self._dim:
            write_text(text)
            return
        write_style(DIM)
        try:
            write_text(text)
        finally:
            write_style(PLAIN)


def note_on_cut(reason: str, max_tokens: int) -> str | None:
    """Return a note on why the answer was cut short, or None if the model ended the answer."""
    if reason == "length":
        return f"The answer was cut after {max_tokens} tokens (--max-tokens)."
    if reason == "context":
        return "The answer was cut: the model's context is full."
    return None
