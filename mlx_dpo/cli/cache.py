"""`mlx-dpo cache`: answers of reference models and tokens, kept for later runs; listed, cleared."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from mlx_dpo.errors import ConfigError
from mlx_dpo.io.atomic import abandoned_paths
from mlx_dpo.paths import MOVES_CACHE, cache_folder, reference_cache, token_cache
from mlx_dpo.units import format_bytes

if TYPE_CHECKING:
    from mlx_dpo.training.logps_cache import ModelGroup

HEADINGS = ("model", "computed on", "files", "pairs", "size", "last used")
TOKEN_HEADINGS = ("tokens of", "model", "pairs", "size", "last used")
NUMBERS = ("files", "pairs", "size")
KINDS = ("reference", "tokens")


class Shelf(NamedTuple):
    """A folder of the cache, and what lies there."""

    folder: Path
    found: Sequence[Any]  # entries of files
    left: Sequence[Path]  # half-written

    @property
    def total(self) -> str:
        """Of everything that is there."""
        size = sum(one.size for one in self.found) + sum(path.stat().st_size for path in self.left)
        return f"{_files(len(self.found) + len(self.left))}, {format_bytes(size)}"


def _shelves() -> dict[str, Shelf]:
    from mlx_dpo.data.tokenization import cache as kept
    from mlx_dpo.training import logps_cache as answers

    rooms = {"reference": (reference_cache(), answers), "tokens": (token_cache(), kept)}
    return {
        name: Shelf(folder, room.list_entries(folder), abandoned_paths(folder))
        for name, (folder, room) in rooms.items()
    }


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
@click.pass_context
def cache(ctx: click.Context, as_json: bool) -> None:
    """List what runs share, reference answers and tokens of pairs; `cache clear` removes it.

    A run asks its reference about every pair once, and tokenizes a large source once. Both are
    kept in the user's cache folder, under a digest of all that determines them; the environment
    variable MLX_DPO_CACHE names another folder. Without them, the next run does it again:
    clearing costs time alone.
    """
    if ctx.invoked_subcommand is not None:
        if as_json:
            raise ConfigError("`--json` has no effect with `cache clear`")
        return
    reference, tokens = _shelves().values()
    if as_json:
        click.echo(json.dumps(_report(reference, tokens)))
        return
    if reference.found or reference.left:
        _show(reference)
    if tokens.found or tokens.left:
        _show_tokens(tokens)
    if not any(shelf.found or shelf.left for shelf in (reference, tokens)):
        moves = f"{cache_folder()} ({MOVES_CACHE} moves it)"
        click.echo(f"Nothing is kept yet: {moves} fills as runs are made")


@cache.command()
@click.option(
    "--older-than",
    type=click.FloatRange(min=0),
    metavar="DAYS",
    help="Only what no run has read for so many days.",
)
@click.option("--model", metavar="NAME", help="Only what is of this model, as `cache` names it.")
@click.option("--only", type=click.Choice(KINDS), help="Only this kind.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def clear(older_than: float | None, model: str | None, only: str | None, yes: bool) -> None:
    """Remove what is kept, after saying what will go.

    Runs under way are not disturbed: they hold what they need.
    """
    shelves = [shelf for name, shelf in _shelves().items() if only in (None, name)]
    _refuse_unknown(model, [entry for shelf in shelves for entry in shelf.found])
    going: list[Path] = []
    freed = 0
    for folder, found, left in shelves:
        chosen = [entry for entry in found if _meant(entry, older_than, model)]
        paths = [entry.path for entry in chosen] + list(left)
        size = sum(path.stat().st_size for path in paths)
        pairs = sum(entry.pairs for entry in chosen)
        if paths:
            what = f"{_files(len(paths))}, {pairs:,} pairs, {format_bytes(size)}"
            click.echo(f"To be removed from {folder}: {what}")
        going, freed = going + paths, freed + size
    if not going:
        click.echo(f"Nothing to clear in {cache_folder()}")
        return
    if not yes:
        _ask()
    for path in going:
        path.unlink(missing_ok=True)
    click.echo(f"Freed {format_bytes(freed)}")


def _meant(entry: Any, older_than: float | None, model: str | None) -> bool:
    if model is not None and entry.model != model:
        return False
    return older_than is None or entry.last_used < datetime.now(UTC) - timedelta(days=older_than)


def _refuse_unknown(model: str | None, found: Sequence[Any]) -> None:
    names = sorted({entry.model for entry in found})
    if model is not None and model not in names:
        known = ", ".join(f"`{name}`" for name in names) or "no model at all"
        raise ConfigError(f"--model: nothing of `{model}` is in the cache (there is {known})")


def _ask() -> None:
    if not sys.stdin.isatty():
        raise ConfigError("`cache clear` asks first, and nobody is there to answer; add --yes")
    click.confirm("Remove them?", abort=True)


def _show(shelf: Shelf) -> None:
    from mlx_dpo.training.logps_cache import group_by_model

    click.echo(f"{shelf.folder} ({MOVES_CACHE} moves it)\n")
    _table([HEADINGS, *map(_row, group_by_model(shelf.found))])
    click.echo(f"\n{shelf.total}")
    _show_wrong(shelf, "its pairs will be scored again")


def _show_tokens(shelf: Shelf) -> None:
    click.echo(f"{shelf.folder} ({MOVES_CACHE} moves it)\n")
    _table([TOKEN_HEADINGS, *map(_token_row, shelf.found)])
    click.echo(f"\n{shelf.total}")
    _show_wrong(shelf, "its pairs will be tokenized again")


def _show_wrong(shelf: Shelf, then: str) -> None:
    for entry in shelf.found:
        if entry.damaged:
            click.echo(f"damaged, {then}: {entry.path.name}")
    for path in shelf.left:
        click.echo(f"half-written by a process that is gone: {path.name}")


def _table(rows: Sequence[Sequence[str]]) -> None:
    """Columns under the headings of the first row."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if heading in NUMBERS else cell.ljust(width)
            for cell, width, heading in zip(row, widths, rows[0], strict=True)
        ]
        click.echo("  ".join(cells).rstrip())


def _token_row(entry: Any) -> tuple[str, ...]:
    used = f"{entry.last_used.astimezone():%Y-%m-%d}"
    return (entry.name, entry.model, f"{entry.pairs:,}", format_bytes(entry.size), used)


def _row(group: "ModelGroup") -> tuple[str, ...]:
    return (
        group.model,
        group.computed_on,
        f"{group.files:,}",
        f"{group.pairs:,}",
        format_bytes(group.size),
        f"{group.last_used.astimezone():%Y-%m-%d}",
    )


def _report(reference: Shelf, tokens: Shelf) -> dict[str, Any]:
    from mlx_dpo.training.logps_cache import group_by_model

    return {
        "folder": str(reference.folder),
        "models": [_plain(asdict(group)) for group in group_by_model(reference.found)],
        **_wrong(reference),
        "tokens": {
            "folder": str(tokens.folder),
            "sources": [
                _plain(asdict(one) | {"path": one.path.name})
                for one in tokens.found
                if not one.damaged
            ],
            **_wrong(tokens),
        },
    }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return values | {"last_used": values["last_used"].isoformat(timespec="seconds")}


def _wrong(shelf: Shelf) -> dict[str, list[str]]:
    return {
        "damaged": [entry.path.name for entry in shelf.found if entry.damaged],
        "half_written": [path.name for path in shelf.left],
    }


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count:,} files"
