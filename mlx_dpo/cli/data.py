"""`mlx-dpo data`: example pairs; check, show, split and clean data sets before training."""

import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from mlx_dpo.cli.command import FILE, FOLDER, Command, Group
from mlx_dpo.cli.output import echo, echo_json
from mlx_dpo.cli.setting_flags import (
    SettingsCommand,
    check_none_missing,
    config_flag,
    pairs_argument,
    read_settings,
    setting_flags,
    typed_settings,
)
from mlx_dpo.config.dpo_config import DPOConfig, get_settings
from mlx_dpo.errors import ConfigError
from mlx_dpo.phases import phase

CommandFunction = Callable[..., Any]
ROW_SETTINGS = (
    "split",
    "schema",
    "column",
    "ranked",
    "loss_type",
)  # settings that find and parse rows
SCAN_SETTINGS = (
    "valid", "pair_labelled", "margin_column", "weight_column", "model", "revision",
    "trust_remote_code", "system", "chat_template", "thinking", "max_length", "truncation",
)  # fmt: skip


@click.group(
    cls=Group,
    examples=(
        "mlx-dpo data example --output pairs.jsonl",
        "mlx-dpo data check pairs.jsonl --model model",
        "mlx-dpo data show pairs.jsonl --model model",
        "mlx-dpo data clean pairs.jsonl --output clean.jsonl",
        "mlx-dpo data split clean.jsonl --output data",
    ),
)
def data() -> None:
    """Check, show, split and clean preference pairs before training."""


def _flags(
    *names: str, shows_required: bool = False
) -> Callable[[CommandFunction], CommandFunction]:
    """Return a decorator that adds the argument PAIRS, `--config` and the flags of some settings.

    Args:
        names: Names of the settings.
        shows_required: Whether the command cannot do without required settings, such as the model.
    """
    wanted = [get_settings()[name] for name in names]

    def decorate(command: CommandFunction) -> CommandFunction:
        command = setting_flags(lambda spec: spec in wanted, shows_required=shows_required)(command)
        return pairs_argument(config_flag(command))

    return decorate


def _read_config(flags: dict[str, Any], required: tuple[str, ...] = ("pairs",)) -> DPOConfig:
    """Return the settings of the `--config` file, overridden by flags on the command line."""
    config_file = flags.pop("config_file")
    values = read_settings(config_file) if config_file else {}
    values |= typed_settings(click.get_current_context(), flags)
    check_none_missing(click.get_current_context(), values, required)
    return DPOConfig.from_dict(values)


@data.command(
    cls=Command,
    short_help="print or write ten example pairs",
    examples=(
        "mlx-dpo data example",
        "mlx-dpo data example --output pairs.jsonl",
        "mlx-dpo data example --all --output pairs",
    ),
)
@click.option(
    "--all", "all_pairs", is_flag=True, help="Write the demo's 1,200 pairs for tiny-chat instead."
)
@click.option(
    "-o",
    "--output",
    type=FILE,
    metavar="FILE",
    help="New file to write; with --all a new folder.",
    show_default="print the pairs",
)
def example(all_pairs: bool, output: str | None) -> None:
    """Print or write ten example pairs, to see what a pair looks like.

    With --all, write the pairs of the demo instead: 1,000 in train.jsonl and 200 in valid.jsonl.
    They teach the shipped model tiny-chat to answer politely.
    """
    if all_pairs and output is None:
        raise ConfigError("missing --output; --all writes a folder")

    from mlx_dpo.cli import program
    from mlx_dpo.curation.example_pairs import write_demo_pairs, write_example_pairs
    from mlx_dpo.paths import example_pairs, tiny_chat

    if output is None:
        echo(example_pairs().read_text(encoding="utf-8"), nl=False)
        return
    path = Path(output).expanduser()
    if all_pairs:
        counts = write_demo_pairs(path)
        echo(f"{output}: {counts['train']:,} pairs to train on, {counts['valid']:,} held out")
        model = shlex.quote(str(tiny_chat()))
        echo(f"Train on them: {program()} train {shlex.quote(output)} --model {model} --output run")
    else:
        echo(f"{output}: {write_example_pairs(path)} pairs")
        echo(f"Check them: {program()} data check {shlex.quote(output)}")


@data.command(
    cls=SettingsCommand,
    short_help="report dropped, odd and wrong rows, with line numbers",
    examples=(
        "mlx-dpo data check pairs.jsonl --model model",
        "mlx-dpo data check train.jsonl --valid valid.jsonl --strict",
    ),
)
@click.option("--strict", is_flag=True, help="Exit with status 1 if there is an error.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object, with every line number."
)
@_flags(*ROW_SETTINGS, *SCAN_SETTINGS)
def check(strict: bool, as_json: bool, **flags: Any) -> None:
    """Report how `train` would use PAIRS, and which rows are dropped, odd or wrong.

    Rows are read as `train` reads them. Without --model nothing is tokenized: lengths are in
    characters, and checks that need tokens are skipped. The model's weights are not loaded. Each
    finding is an error or a warning; docs/data.md lists all checks.
    """
    config = _read_config(flags)

    from mlx_dpo.cli.data_findings import print_results
    from mlx_dpo.curation.check import check_pairs
    from mlx_dpo.reporting.terminal.console import make_console

    with phase("Reading", unit="rows") as progress:
        _, results = check_pairs(config, progress)
    if as_json:
        echo_json(results.to_dict())
    else:
        print_results(make_console(), results)
    sys.exit(1 if strict and results.error_count else 0)


@data.command(
    cls=SettingsCommand,
    short_help="show pairs as the model sees them",
    examples=(
        "mlx-dpo data show pairs.jsonl --model model",
        "mlx-dpo data show pairs.jsonl --model model --row 17",
    ),
)
@click.option(
    "-n",
    "--limit",
    "count",
    type=click.IntRange(1),
    default=3,
    help="Number of pairs, from the beginning.",
)
@click.option(
    "--row", type=click.IntRange(0), help="Show the row at this line number or index instead."
)
@_flags(*ROW_SETTINGS, *SCAN_SETTINGS, shows_required=True)
def show(count: int, row: int | None, **flags: Any) -> None:
    """Show pairs as the model sees them: prompt, scored tokens and truncated tokens.

    Scored tokens count in the loss. A mark before each line, and its color, tell the three kinds
    apart; control tokens are in brackets.
    """
    config = _read_config(flags, required=("pairs", "model"))
    if row is not None and _was_typed("count"):
        raise ConfigError("`-n` has no effect together with --row")

    from mlx_dpo.curation.show import show_pairs
    from mlx_dpo.reporting.pair_view import print_legend, print_pair
    from mlx_dpo.reporting.terminal.console import make_console

    console = make_console()
    for number, preview in enumerate(show_pairs(config, count=count, row=row)):
        if not number:
            print_legend(console)
        print_pair(console, preview.location, preview.notes, preview.segments)


@data.command(
    cls=SettingsCommand,
    short_help="write train.jsonl and valid.jsonl; no prompt is in both",
    examples=("mlx-dpo data split pairs.jsonl --valid-fraction 0.1 --output data",),
    renamed={"--valid": "use --valid-fraction"},
)
@click.option(
    "--valid-fraction",
    "share",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="FRACTION",
    default=0.05,
    help="Fraction of the pairs to hold out.",
)
@click.option(
    "-o", "--output", type=FOLDER, required=True, metavar="FOLDER", help="New folder to write."
)
@_flags(*ROW_SETTINGS, "bad_pairs", "seed")
def split(share: float, output: str, **flags: Any) -> None:
    """Split PAIRS into train.jsonl and valid.jsonl; no prompt is in both. Rows are not changed.

    The held-out rows are those that `train --valid-fraction` would hold out with the same --seed.
    `train FOLDER` uses both files.
    """
    config = _read_config(flags)

    from mlx_dpo.curation.split import split_pairs

    with phase("Splitting"):
        result = split_pairs(config, share=share, output=Path(output).expanduser())
    for report in result.reports:
        for line in report.dropped_lines():
            echo(line)
    for name in result.ignored_sources:
        echo(f"{name}: left alone")
    _print_columns_of_bytes(result.columns_of_bytes)
    echo(f"{output}: {result.rows['train']:,} rows to train on, {result.rows['valid']:,} held out")


@data.command(
    cls=SettingsCommand,
    short_help="write the rows in which `check` finds no errors",
    examples=(
        "mlx-dpo data clean pairs.jsonl --output clean.jsonl",
        "mlx-dpo data clean pairs.jsonl --drop duplicate-pair --output clean.jsonl",
    ),
)
@click.option(
    "--drop",
    multiple=True,
    metavar="FINDING",
    help="Drop the rows that have this finding of `data check`; repeat it for several.",
    show_default="all errors",
)
@click.option(
    "-o", "--output", type=FILE, required=True, metavar="FILE", help="New `.jsonl` file to write."
)
@_flags(*ROW_SETTINGS, *(name for name in SCAN_SETTINGS if name != "pair_labelled"))
def clean(drop: tuple[str, ...], output: str, **flags: Any) -> None:
    """Write PAIRS without the rows in which `check` finds errors; other rows are not changed.

    FINDING is a name that `check` prints. Of duplicates, the first row remains; of a
    contradiction, no row does. A row is dropped if any of its pairs has a finding. A report next
    to FILE, with the suffix `.report.json`, lists the dropped rows and their findings.
    """
    config = _read_config(flags)

    from mlx_dpo.curation.clean import clean_pairs

    with phase("Reading", unit="rows") as progress:
        result = clean_pairs(config, drop=drop, output=Path(output).expanduser(), progress=progress)
    for name, count in result.dropped.items():
        echo(f"{name}: {count:,} row{'s' * (count != 1)}")
    _print_columns_of_bytes(result.columns_of_bytes)
    if result.skipped:
        echo(f"skipped checks (they need --model or held-out pairs): {', '.join(result.skipped)}")
    echo(
        f"{output}: {result.remaining:,} of {result.rows:,} rows; {result.report} lists the "
        "dropped rows"
    )


def _print_columns_of_bytes(counts: Mapping[str, int]) -> None:
    for name, count in counts.items():
        echo(
            f"column `{name}` is left out of {count:,} row{'s' * (count != 1)}: it holds bytes, "
            "which JSON cannot"
        )


def _was_typed(name: str) -> bool:
    source = click.get_current_context().get_parameter_source(name)
    return source is click.core.ParameterSource.COMMANDLINE
