"""Flags of what judges answers: a reward, a model, which may be at an address, or a person."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from mlx_dpo.cli.command import FILE, FOLDER
from mlx_dpo.cli.output import echo

if TYPE_CHECKING:
    from mlx_dpo.openai_client.connection import Connection

Command = Callable[..., Any]
CONNECTION_FLAGS = ("allow_remote", "api_key_env", "max_concurrency", "request_timeout")
RESPONDER = "RUN|MODEL|URL"  # metavar of a flag for what answers prompts
AN_ADDRESS = "an address such as http://127.0.0.1:1234/v1#MODEL"  # for help texts


def judge_flags(command: Command) -> Command:
    """Add the flags `--reward`, `--judge` and `--rubric` to a command."""
    for decorate in (
        click.option(
            "--rubric",
            type=FILE,
            metavar="FILE",
            help="Instructions for the judge model.",
            show_default="built in",
        ),
        click.option(
            "--judge",
            type=FOLDER,
            metavar=RESPONDER,
            help="Judge the answers with this model, which compares them in both orders: a run, a "
            f"model, or {AN_ADDRESS}.",
        ),
        click.option(
            "--reward",
            type=FILE,
            metavar="FILE:FUNCTION|run:RUN",
            help="Score answers with this Python function of (prompt, answer), whose file is run, "
            "or with the implicit reward of RUN, a run folder.",
        ),
    ):
        command = decorate(command)
    return command


def web_flags(text: str) -> Callable[[Command], Command]:
    """Return a decorator that adds `--web`, `--port` and `--no-open` to a command.

    Args:
        text: help text of `--web`.
    """

    def decorate(command: Command) -> Command:
        for add in (
            click.option(
                "--no-open", is_flag=True, help="With --web: only print the page's address."
            ),
            click.option(
                "--port",
                type=click.IntRange(0, 65535),
                metavar="PORT",
                help="Port for --web.",
                show_default="a free one",
            ),
            click.option("--web", is_flag=True, help=text),
        ):
            command = add(command)
        return command

    return decorate


def connection_flags(command: Command) -> Command:
    """Add the flags of connections to models at addresses to a command."""
    for decorate in (
        click.option(
            "--request-timeout",
            default=600.0,
            metavar="SECONDS",
            help="Time limit for one request to an address.",
        ),
        click.option(
            "--max-concurrency", default=4, help="Requests to an address at the same time."
        ),
        click.option(
            "--api-key-env",
            metavar="VARIABLE",
            help="Environment variable with the API key for an address.",
            show_default="OPENAI_API_KEY for api.openai.com only",
        ),
        click.option(
            "--allow-remote",
            is_flag=True,
            help="Allow an address of another machine, which then gets prompts and answers.",
        ),
    ):
        command = decorate(command)
    return command


def make_connection(settings: dict[str, Any], *specs: str | None) -> "Connection":
    """Take the flags of connections out of `settings`, and return the connection settings.

    At the end of the command, the counts of requests and replies are printed.

    Args:
        settings: the flags of the command.
        specs: what the command opens: addresses, models, runs, or None.

    Raises:
        ConfigError: an address may not be used, or a flag has no effect.
    """
    from mlx_dpo.openai_client.connection import Connection, bind_connection

    given = {name: settings.pop(name) for name in CONNECTION_FLAGS}
    connection = bind_connection(Connection(**given), specs)
    print_counts_at_end(connection)
    return connection


def print_counts_at_end(connection: "Connection") -> None:
    """Print what was sent to addresses and what came back when the command ends."""

    def print_counts() -> None:
        if (line := connection.counts.describe()) is not None:
            echo(line, err=True)

    click.get_current_context().call_on_close(print_counts)
