"""The flags that start several ranks: `--ranks`, `--hosts` and those that belong to them."""

import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import click

from mlx_dpo.cli.command import FILE
from mlx_dpo.errors import ConfigError


@dataclass(frozen=True)
class RanksFlags:
    """Values of the flags that start several ranks; each is named like its flag."""

    ranks: int = 1
    hosts: str | None = None
    starting_port: int | None = None
    host_python: str | None = None
    host_folder: str | None = None
    rank_timeout: int | None = None

    @classmethod
    def pop(cls, flags: dict[str, Any]) -> "RanksFlags":
        """Take the flags out of all flags of a command."""
        return cls(**{name: flags.pop(name) for name in cls.__annotations__ if name in flags})

    @property
    def starts_ranks(self) -> bool:
        """Whether they ask for several ranks."""
        return self.ranks > 1 or self.hosts is not None

    def shown(self) -> str:
        """Return the flags as a shell reads them, each after a space; "" without several ranks."""
        if not self.starts_ranks:
            return ""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if self.hosts is not None:
            del given["ranks"]
        words = (f" --{name.replace('_', '-')} {shlex.quote(str(v))}" for name, v in given.items())
        return "".join(words)

    def check(self) -> None:
        """Check that each flag has an effect.

        Raises:
            ConfigError: one has none.
        """
        if self.hosts is None:
            for name in ("starting_port", "host_python", "host_folder"):
                if getattr(self, name) is not None:
                    flag = "--" + name.replace("_", "-")
                    raise ConfigError(f"`{flag}` has no effect without --hosts")
        elif self.ranks > 1:
            raise ConfigError(
                "`--ranks` has no effect with --hosts: the hostfile names the machine of each rank"
            )


def ranks_flags(
    command: Callable[..., Any],
    ranks_help: str = "Share the work among N processes on this machine; the result is the same, "
    "bit for bit.",
    hosts_help: str = "Share the work among the machines of a hostfile of MLX; starts a process on "
    "each over ssh.",
) -> Callable[..., Any]:
    """Add the flags that start several ranks to a command."""
    options = (
        click.option(
            "--ranks",
            type=click.IntRange(min=1),
            default=1,
            metavar="N",
            help=ranks_help,
        ),
        click.option(
            "--hosts",
            type=FILE,
            metavar="FILE",
            help=hosts_help,
        ),
        click.option(
            "--starting-port",
            type=click.IntRange(1, 65_000),
            metavar="PORT",
            show_default="free ports",
            help="With --hosts: listen on this port and the next ones.",
        ),
        click.option(
            "--host-python",
            metavar="PYTHON",
            show_default="the path of this Python",
            help="With --hosts: Python that has mlx-dpo on the other hosts.",
        ),
        click.option(
            "--host-folder",
            metavar="FOLDER",
            show_default="the path of this folder",
            help="With --hosts: working folder on the other hosts.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def rank_timeout_flag(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flag for the time after which a silent rank counts as lost."""
    return click.option(
        "--rank-timeout",
        type=click.IntRange(min=1),
        metavar="SECONDS",
        show_default="120",
        help="With several ranks: end all of them when one is silent for so long.",
    )(command)
