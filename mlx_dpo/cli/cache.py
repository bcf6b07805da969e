"""`mlx-dpo cache`: what reference models said of pairs, kept for later runs; listed and cleared."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_dpo.errors import ConfigError
from mlx_dpo.paths import MOVES_CACHE, reference_cache

if TYPE_CHECKING:
    from mlx_dpo.training.cache import Entry, Group

HEADINGS = ("model", "computed on", "files", "pairs", "size", "last used")


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
@click.pass_context
def cache(ctx: click.Context, as_json: bool) -> None:
    """List what reference models said of pairs, which runs share; `cache clear` removes it.

    A run asks its reference about every pair once. The answers are kept in the user's cache
    folder, under a digest of all that determines them; the environment variable MLX_DPO_CACHE
    names another folder. Without them, the next run asks again: clearing costs time alone.
    """
    if ctx.invoked_subcommand is not None:
        if as_json:
            raise ConfigError("`--json` has no effect with `cache clear`")
        return
    from mlx_dpo.training.cache import abandoned, entries, groups

    folder = reference_cache()
    found, left = entries(folder), abandoned(folder)
    if as_json:
        click.echo(json.dumps(_report(folder, groups(found), found, left)))
    elif found or left:
        _show(folder, groups(found), found, left)
    else:
        click.echo(f"Nothing is kept yet: {folder} ({MOVES_CACHE} moves it) fills as runs are made")


@cache.command()
@click.option(
    "--older-than",
    type=click.FloatRange(min=0),
    metavar="DAYS",
    help="Only what no run has read for so many days.",
)
@click.option("--model", metavar="NAME", help="Only what this model said, as `cache` names it.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def clear(older_than: float | None, model: str | None, yes: bool) -> None:
    """Remove what reference models said of pairs, after saying what will go.

    Runs under way are not disturbed: they hold what they need.
    """
    from mlx_dpo.training.cache import abandoned, entries

    folder = reference_cache()
    found = entries(folder)
    _refuse_unknown(model, found)
    chosen = [entry for entry in found if _meant(entry, older_than, model)]
    going = [entry.path for entry in chosen] + abandoned(folder)
    if not going:
        click.echo(f"Nothing to clear in {folder}")
        return
    size = sum(path.stat().st_size for path in going)
    pairs = sum(entry.pairs for entry in chosen)
    click.echo(f"To be removed from {folder}: {_files(len(going))}, {pairs:,} pairs, {_size(size)}")
    if not yes:
        _ask()
    for path in going:
        path.unlink(missing_ok=True)
    click.echo(f"Freed {_size(size)}")


def _meant(entry: "Entry", older_than: float | None, model: str | None) -> bool:
    if model is not None and entry.model != model:
        return False
    return older_than is None or entry.last_used < datetime.now(UTC) - timedelta(days=older_than)


def _refuse_unknown(model: str | None, found: Sequence["Entry"]) -> None:
    names = sorted({entry.model for entry in found})
    if model is not None and model not in names:
        known = ", ".join(f"`{name}`" for name in names) or "no model at all"
        raise ConfigError(f"--model: nothing of `{model}` is in the cache (there is {known})")


def _ask() -> None:
    if not sys.stdin.isatty():
        raise ConfigError("`cache clear` asks first, and nobody is there to answer; add --yes")
    click.confirm("Remove them?", abort=True)


def _show(
    folder: Path, groups: Sequence["Group"], found: Sequence["Entry"], left: Sequence[Path]
) -> None:
    click.echo(f"{folder} ({MOVES_CACHE} moves it)\n")
    rows = [HEADINGS, *map(_row, groups)]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if heading in ("files", "pairs", "size") else cell.ljust(width)
            for cell, width, heading in zip(row, widths, HEADINGS, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())
    total = sum(entry.size for entry in found) + sum(path.stat().st_size for path in left)
    click.echo(f"\n{_files(len(found) + len(left))}, {_size(total)}")
    for entry in found:
        if entry.damaged:
            click.echo(f"damaged, its pairs will be scored again: {entry.path.name}")
    for path in left:
        click.echo(f"half-written by a process that is gone: {path.name}")


def _row(group: "Group") -> tuple[str, ...]:
    return (
        group.model,
        group.computed_on,
        f"{group.files:,}",
        f"{group.pairs:,}",
        _size(group.size),
        f"{group.last_used.astimezone():%Y-%m-%d}",
    )


def _report(
    folder: Path, groups: Sequence["Group"], found: Sequence["Entry"], left: Sequence[Path]
) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "models": [
            asdict(group) | {"last_used": group.last_used.isoformat(timespec="seconds")}
            for group in groups
        ],
        "damaged": [entry.path.name for entry in found if entry.damaged],
        "half_written": [path.name for path in left],
    }


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count:,} files"


def _size(size: int) -> str:
    from rich.filesize import decimal

    return decimal(size)
