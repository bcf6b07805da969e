"""What `chat` and `generate` share: flags for sampling, the model they talk to, text on stdout."""

import re
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

import click

from mlx_dpo.policy.sampling import Sampling

if TYPE_CHECKING:
    from mlx_dpo.conversation.chat import Chat

# Escape sequences in a model's text must not steer a terminal; newline and tab may stay.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

Command = Callable[..., Any]


def model_flags(command: Command) -> Command:
    """Add `--model`, `--reference`, `--system` and `--thinking`."""
    for decorate in (
        click.option(
            "--thinking/--no-thinking",
            default=None,
            help="Let a model think first that can. [default: no-thinking]",
        ),
        click.option("--system", metavar="TEXT", help="System message before everything."),
        click.option(
            "--reference", is_flag=True, help="Talk to the run's model without its adapter."
        ),
        click.option("--model", metavar="MODEL", help="A folder or Hub id, in place of a run."),
    ):
        command = decorate(command)
    return command


def sampling_flags(**defaults: Any) -> Callable[[Command], Command]:
    """Add a flag for each field of `Sampling`; `defaults` replace those declared there."""

    def decorate(command: Command) -> Command:
        for f in reversed(fields(Sampling)):
            assert f.default is not MISSING
            default = defaults.get(f.name, f.default)
            option = f.metadata["option"]
            command = click.option(
                "--" + f.name.replace("_", "-"),
                type=option.kind,
                default=default,
                show_default=default is not None,
                help=option.help,
            )(command)
        return command

    return decorate


def open_chat(
    sampling: Sampling,
    *,
    run: str | None,
    model: str | None,
    reference: bool,
    system: str | None,
    thinking: bool | None,
    raw: bool = False,
) -> tuple["Chat", str]:
    """Load what is to be talked to, say on stderr what loading had to say; chat and source.

    A run is spoken to as it was trained: as plain text, or thinking, where it was.
    """
    from mlx_dpo.conversation.chat import Chat
    from mlx_dpo.policy.generation import context_length
    from mlx_dpo.runs import load_policy, open_run

    base = load_policy(run, model=model, reference=reference)
    for note in base.notes:
        click.echo(note, err=True)
    if run is not None:
        opened = open_run(run)
        raw = raw or opened.trained_on_text
        thinking = opened.config.thinking if thinking is None and not raw else thinking
    context = context_length(base.config)
    chat = Chat(
        base.model,
        base.tokenizer,
        sampling,
        system=system,
        thinking=thinking,
        context=context,
        raw=raw,
    )
    return chat, base.source


def write(text: str) -> None:
    """Text of a model: without control characters on a terminal, exactly as it is elsewhere."""
    # click.echo would strip escape sequences from what goes into a pipe.
    sys.stdout.write(CONTROLS.sub("", text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def cut_note(reason: str, max_tokens: int) -> str | None:
    """What to say of an answer that the model did not end, None if it did."""
    if reason == "length":
        return f"The answer was cut after {max_tokens} tokens (--max-tokens)."
    if reason == "context":
        return "The answer was cut: the model's context is full."
    return None
