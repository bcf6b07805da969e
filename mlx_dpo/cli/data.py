"""`mlx-dpo data`: pairs looked at, shown, split and cleaned before anything is trained on them."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_dpo.cli.train import SettingsCommand, read_settings, setting_flags, typed_settings
from mlx_dpo.config.dpo_config import DPOConfig, get_settings
from mlx_dpo.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

Command = Callable[..., Any]
ROWS = ("split", "schema", "column", "ranked", "loss_type")  # how rows are found and read
LOOKS = (
    "valid", "pair_labelled", "margin_column", "weight_column", "model", "revision",
    "trust_remote_code", "system", "chat_template", "thinking", "max_length", "truncation",
)  # fmt: skip


@click.group()
def data() -> None:
    """Check, show, split and clean pairs before anything is trained on them.

    \b
    mlx-dpo data check pairs.jsonl --model MODEL       what is lost, odd or wrong, and where
    mlx-dpo data show pairs.jsonl --model MODEL        pairs as the model sees them
    mlx-dpo data split pairs.jsonl --output folder     train.jsonl, valid.jsonl; no prompt in both
    mlx-dpo data clean pairs.jsonl --output new.jsonl  without the rows at fault
    """


def _flags(*names: str) -> Callable[[Command], Command]:
    """PAIRS, `--config`, and the flags of these settings."""
    wanted = [get_settings()[name] for name in names]

    def decorate(command: Command) -> Command:
        command = setting_flags(lambda spec: spec in wanted)(command)
        config = click.option("--config", "config_file", metavar="FILE", help="YAML of settings.")
        return click.argument("pairs", nargs=-1)(config(command))

    return decorate


def _config(flags: dict[str, Any]) -> DPOConfig:
    """The settings of a file and those that were typed."""
    config_file = flags.pop("config_file")
    values = read_settings(config_file) if config_file else {}
    values |= typed_settings(click.get_current_context(), flags)
    if not values.get("pairs"):
        name = click.get_current_context().command.name
        raise ConfigError(f"PAIRS is missing; see `mlx-dpo data {name} --help`")
    return DPOConfig.from_dict(values)


@data.command(cls=SettingsCommand)
@click.option("--strict", is_flag=True, help="Exit with 1 if there is a fault.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, with every place.")
@_flags(*ROWS, *LOOKS)
def check(strict: bool, as_json: bool, **flags: Any) -> None:
    """Say what would be trained on of PAIRS, and what is lost, odd or wrong, and where.

    Rows are read as `train` reads them. Without --model nothing is tokenised: lengths are in
    characters then, and what takes tokens is not looked for. Weights are not loaded. Each
    finding is a fault or a remark; docs/data.md lists them.
    """
    config = _config(flags)

    from mlx_dpo.cli.data_findings import print_checked
    from mlx_dpo.curation.check import check_pairs
    from mlx_dpo.reporting.console import make_console

    console = make_console()
    with _reading(console) as tick:
        _, checked = check_pairs(config, tick)
    if as_json:
        click.echo(json.dumps(checked.to_dict(), ensure_ascii=False))
    else:
        print_checked(console, checked)
    sys.exit(1 if strict and checked.faults else 0)


@data.command(cls=SettingsCommand)
@click.option("-n", "count", type=click.IntRange(1), default=3, help="Pairs to show.")
@click.option("--row", type=click.IntRange(0), help="The row at this line or index instead.")
@_flags(*ROWS, *LOOKS)
def show(count: int, row: int | None, **flags: Any) -> None:
    """Show pairs as the model sees them: what is read, what is scored, what was cut.

    A mark before each line says what is done with it, brackets stand round control tokens;
    colours say the same.
    """
    config = _config(flags)
    if row is not None and _typed("count"):
        raise ConfigError("`-n` has no effect beside --row")

    from mlx_dpo.curation.check import show_pairs
    from mlx_dpo.reporting.console import make_console
    from mlx_dpo.reporting.pair_view import print_legend, print_pair

    console = make_console()
    for number, page in enumerate(show_pairs(config, count=count, row=row)):
        if not number:
            print_legend(console)
        print_pair(console, page.location, page.notes, page.parts)


@data.command(cls=SettingsCommand)
@click.option(
    "--valid", "share", default=0.05, help="Share of the pairs to hold out.",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
)  # fmt: skip
@click.option("--output", required=True, metavar="DIR", help="New folder to write.")
@_flags(*ROWS, "bad_pairs", "seed")
def split(share: float, output: str, **flags: Any) -> None:
    """Write train.jsonl and valid.jsonl; no prompt is in both, rows stay as they were written.

    Held out are the rows that `train --valid-fraction` would hold out with the same --seed.
    `train DIR` takes both files.
    """
    config = _config(flags)

    from mlx_dpo.curation.split import split_pairs

    done = split_pairs(config, share=share, output=Path(output).expanduser())
    for report in done.reports:
        for line in report.left_out():
            click.echo(line)
    for name in done.passed_over:
        click.echo(f"{name}: left alone")
    click.echo(
        f"{output}: {done.rows['train']:,} rows to train on, {done.rows['valid']:,} held out"
    )


@data.command(cls=SettingsCommand)
@click.option(
    "--drop", multiple=True, metavar="FINDING",
    help="A finding whose rows go; repeat it. [default: all faults]",
)  # fmt: skip
@click.option("--output", required=True, metavar="FILE", help="New `.jsonl` file to write.")
@_flags(*ROWS, *(name for name in LOOKS if name != "pair_labelled"))
def clean(drop: tuple[str, ...], output: str, **flags: Any) -> None:
    """Write PAIRS without the rows that `check` found something in; others stay as written.

    FINDING is a name that `check` prints. Of duplicates the first stays, of a contradiction
    none; a row goes if any of its pairs does. FILE.report.json says which rows went and why.
    """
    config = _config(flags)

    from mlx_dpo.curation.clean import clean_pairs
    from mlx_dpo.reporting.console import make_console

    with _reading(make_console()) as tick:
        done = clean_pairs(config, drop=drop, output=Path(output).expanduser(), tick=tick)
    for name, count in done.dropped.items():
        click.echo(f"{name}: {count:,} row{'s' * (count != 1)}")
    if done.not_looked_for:
        click.echo(
            f"not looked for without --model and held-out pairs: {', '.join(done.not_looked_for)}"
        )
    click.echo(f"{output}: {done.kept:,} of {done.rows:,} rows; {done.report} says which went")


def _typed(name: str) -> bool:
    source = click.get_current_context().get_parameter_source(name)
    return source is click.core.ParameterSource.COMMANDLINE


@contextmanager
def _reading(console: "Console") -> Iterator[Callable[[int], None]]:
    """Count rows on a terminal; elsewhere nothing is shown."""
    if not console.is_terminal:
        yield lambda more: None
        return
    rows = 0
    with console.status("reading") as status:

        def tick(more: int) -> None:
            nonlocal rows
            rows += more
            if rows % 100 == 0:
                status.update(f"reading: {rows:,} rows")

        yield tick
