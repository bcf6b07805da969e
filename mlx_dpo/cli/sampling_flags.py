"""Flags that several commands share: sampling settings, judges, and models at addresses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

import click

from mlx_dpo.cli.command import FILE, FOLDER
from mlx_dpo.cli.output import echo
from mlx_dpo.config.sampling import Sampling

if TYPE_CHECKING:
    from mlx_dpo.openai_client.connection import Connection

Command = Callable[..., Any]
DEFAULT_SEED = 0  # of commands that compare answers
CONNECTION_FLAGS = ("allow_remote", "api_key_env", "max_concurrency", "request_timeout")


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
            metavar="MODEL",
            help="Judge the answers with this model, which compares them in both orders: a folder, "
            "a Hub id, or an address such as http://127.0.0.1:1234/v1#MODEL.",
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


def sampling_flags(
    *,
    without: Sequence[str] = (),
    many_temperatures: bool = False,
    remarks: Mapping[str, str] | None = None,
    **defaults: Any,
) -> Callable[[Command], Command]:
    """Return a decorator that adds a flag to a command for each field of `Sampling`.

    Args:
        without: Fields that get no flag.
        many_temperatures: Whether `--temperature` may be given several times.
        remarks: Sentences for help texts, by field: why the default of this command differs.
        defaults: Default values for this command that differ from those of `Sampling`.
    """

    def decorate(command: Command) -> Command:
        for field in reversed([field for field in fields(Sampling) if field.name not in without]):
            assert field.default is not MISSING
            setting, default = field.metadata["setting"], defaults.get(field.name, field.default)
            many = many_temperatures and field.name == "temperature"
            remark = (remarks or {}).get(field.name)
            command = click.option(
                "--" + field.name.replace("_", "-"),
                type=setting.type,
                default=[default] if many else default,
                multiple=many,
                show_default=setting.default_text if default is None else True,
                metavar=setting.shown_metavar,
                help=f"{setting.help} {remark}" if remark else setting.help,
            )(command)
        return command

    return decorate


def make_samplings(settings: dict[str, Any]) -> tuple[Sampling, ...]:
    """Return the sampling settings as one `Sampling` for each given temperature.

    Raises:
        ConfigError: a setting is out of its bounds, or has no effect.
    """
    temperature = settings.pop("temperature")
    temperatures = temperature if isinstance(temperature, list | tuple) else [temperature]
    # The default seed is dropped for greedy decoding, where a seed has no effect.
    if settings["seed"] == DEFAULT_SEED:
        return tuple(
            Sampling(**settings | {"temperature": t, "seed": DEFAULT_SEED if t else None})
            for t in temperatures
        )
    return tuple(Sampling(**settings, temperature=t) for t in temperatures)
