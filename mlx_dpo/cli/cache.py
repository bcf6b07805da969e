"""`mlx-dpo cache`: list and clear cached log-probabilities, tokenized pairs and replies."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from mlx_dpo.cli.command import Command, Group
from mlx_dpo.cli.output import echo, echo_json
from mlx_dpo.errors import ConfigError
from mlx_dpo.io.atomic import abandoned_paths
from mlx_dpo.paths import CACHE_VARIABLE, cache_folder
from mlx_dpo.units import format_bytes

if TYPE_CHECKING:
    from mlx_dpo.training.logps_cache import ModelGroup

HEADINGS = ("model", "computed on", "files", "pairs", "size", "last used")
TOKEN_HEADINGS = ("tokens of", "model", "pairs", "size", "last used")
REPLY_HEADINGS = ("replies of", "replies", "size", "last used")
NUMBERS = ("files", "pairs", "replies", "size")
KINDS = ("reference", "tokens", "replies")


class CacheFolder(NamedTuple):
    """A folder of the cache, with its entries and its leftover temporary files."""

    folder: Path
    entries: Sequence[Any]
    leftovers: Sequence[Path]  # temporary files of ended processes

    @property
    def total(self) -> str:
        """Number and total size of the folder's files, as text."""
        size = sum(entry.size for entry in self.entries)
        size += sum(_size(path) for path in self.leftovers)
        return f"{_files(len(self.entries) + len(self.leftovers))}, {format_bytes(size)}"


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:  # another process clears the cache
        return 0


def _folder_of(kind: str) -> Path:
    """Return the cache folder of a kind of files.

    Raises:
        ConfigError: no home folder is known.
    """
    folder = cache_folder()
    if folder is None:
        raise ConfigError(
            f"no cache folder: the home folder is unknown; set HOME or {CACHE_VARIABLE}"
        )
    return folder / kind


def _cache_folders() -> dict[str, CacheFolder]:
    from mlx_dpo.data.tokenization import cache as tokens
    from mlx_dpo.openai_client import reply_cache
    from mlx_dpo.training import logps_cache

    return {
        kind: CacheFolder(
            _folder_of(kind),
            module.list_entries(_folder_of(kind)),
            abandoned_paths(_folder_of(kind)),
        )
        for kind, module in zip(KINDS, (logps_cache, tokens, reply_cache), strict=True)
    }


@click.group(
    cls=Group,
    invoke_without_command=True,
    examples=("mlx-dpo cache", "mlx-dpo cache clear --older-than 30"),
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@click.pass_context
def cache(ctx: click.Context, as_json: bool) -> None:
    """List cached reference log-probabilities, tokenized pairs and replies of models at addresses.

    Commands reuse them instead of computing or asking again (tokens are cached for large sources
    only). They are stored in the user's cache folder, or in the folder that MLX_DPO_CACHE names,
    under a digest of everything they depend on. `cache clear` deletes them, which is safe: the next
    command computes them, or asks, again. A server does not say when a model changes under its
    name; delete its replies then.
    """
    if ctx.invoked_subcommand is not None:
        if as_json:
            raise ConfigError("`--json` has no effect with `cache clear`")
        return
    reference, tokens, replies = _cache_folders().values()
    if as_json:
        echo_json(_report(reference, tokens, replies))
        return
    if reference.entries or reference.leftovers:
        _show(reference)
    if tokens.entries or tokens.leftovers:
        _show_tokens(tokens)
    if replies.entries or replies.leftovers:
        _show_replies(replies)
    if not any(contents.entries or contents.leftovers for contents in (reference, tokens, replies)):
        echo(f"The cache at {cache_folder()} is empty. (Set {CACHE_VARIABLE} to move it.)")


@cache.command(
    cls=Command,
    short_help="delete cached files, after asking",
    examples=("mlx-dpo cache clear", "mlx-dpo cache clear --older-than 30 --yes"),
)
@click.option(
    "--older-than",
    type=click.FloatRange(min=0),
    metavar="DAYS",
    help="Delete only entries that no run has read for this many days.",
)
@click.option(
    "-m", "--model", metavar="MODEL", help="Delete only entries of this model, as `cache` lists it."
)
@click.option("--only", type=click.Choice(KINDS), help="Delete only this kind of entries.")
@click.option("--yes", is_flag=True, help="Delete without asking.")
def clear(older_than: float | None, model: str | None, only: str | None, yes: bool) -> None:
    """Delete cached files, after printing their number and size and asking.

    Runs in progress are not affected: they have already read what they need.
    """
    cache_folders = [
        contents for name, contents in _cache_folders().items() if only in (None, name)
    ]
    _check_model(model, [entry for contents in cache_folders for entry in contents.entries])
    to_remove: list[Path] = []
    freed = 0
    for folder, entries, leftovers in cache_folders:
        selected = [entry for entry in entries if _is_selected(entry, older_than, model)]
        paths = [entry.path for entry in selected] + list(leftovers)
        size = sum(map(_size, paths))
        if paths:
            what = f"{_files(len(paths))}, {_content(selected)}, {format_bytes(size)}"
            echo(f"Files to remove from {folder}: {what}")
        to_remove, freed = to_remove + paths, freed + size
    if not to_remove:
        echo(f"Nothing to clear in {cache_folder()}")
        return
    if not yes:
        _confirm()
    refused = [path for path in to_remove if not _remove(path)]
    echo(f"Freed {format_bytes(freed - sum(map(_size, refused)))}")
    if refused:
        raise ConfigError(
            f"{refused[0]}: {len(refused)} of {_files(len(to_remove))} could not be removed; "
            "remove them by hand"
        )


def _content(entries: Sequence[Any]) -> str:
    """Return how many pairs or replies the entries have, which are all of one kind."""
    if any(hasattr(entry, "replies") for entry in entries):
        count = sum(entry.replies for entry in entries)
        return "1 reply" if count == 1 else f"{count:,} replies"
    return f"{sum(entry.pairs for entry in entries):,} pairs"


def _remove(path: Path) -> bool:
    """Remove a file; return False if it cannot be removed, or is a folder that is not empty."""
    try:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _is_selected(entry: Any, older_than: float | None, model: str | None) -> bool:
    if model is not None and entry.model != model:
        return False
    return older_than is None or entry.last_used < datetime.now(UTC) - timedelta(days=older_than)


def _check_model(model: str | None, entries: Sequence[Any]) -> None:
    names = sorted({entry.model for entry in entries})
    if model is not None and model not in names:
        known = ", ".join(f"`{name}`" for name in names) or "no model"
        raise ConfigError(f"--model: the cache has no entries of `{model}` (found {known})")


def _confirm() -> None:
    if not sys.stdin.isatty():
        raise ConfigError(
            "`cache clear` asks for confirmation, but stdin is not a terminal; add --yes"
        )
    click.confirm("Remove them?", abort=True)


def _show(contents: CacheFolder) -> None:
    from mlx_dpo.training.logps_cache import group_by_model

    echo(f"{contents.folder} (set {CACHE_VARIABLE} to move it)\n")
    _table([HEADINGS, *map(_row, group_by_model(contents.entries))])
    echo(f"\n{contents.total}")
    _show_damaged(contents, "its pairs will be scored again")


def _show_tokens(contents: CacheFolder) -> None:
    echo(f"{contents.folder} (set {CACHE_VARIABLE} to move it)\n")
    _table([TOKEN_HEADINGS, *map(_token_row, contents.entries)])
    echo(f"\n{contents.total}")
    _show_damaged(contents, "its pairs will be tokenized again")


def _show_replies(contents: CacheFolder) -> None:
    echo(f"{contents.folder} (set {CACHE_VARIABLE} to move it)\n")
    _table([REPLY_HEADINGS, *map(_reply_row, contents.entries)])
    echo(f"\n{contents.total}")
    _show_damaged(contents, "its replies will be asked for again")


def _show_damaged(contents: CacheFolder, consequence: str) -> None:
    for entry in contents.entries:
        if entry.damaged:
            echo(f"damaged or of another version, {consequence}: {entry.path.name}")
    for path in contents.leftovers:
        echo(f"unfinished file of an ended process: {path.name}")


def _table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows as a table with aligned columns.

    The first row contains the headings.
    """
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if heading in NUMBERS else cell.ljust(width)
            for cell, width, heading in zip(row, widths, rows[0], strict=True)
        ]
        echo("  ".join(cells).rstrip())


def _token_row(entry: Any) -> tuple[str, ...]:
    used = f"{entry.last_used.astimezone():%Y-%m-%d}"
    return (entry.name, entry.model, f"{entry.pairs:,}", format_bytes(entry.size), used)


def _reply_row(entry: Any) -> tuple[str, ...]:
    used = f"{entry.last_used.astimezone():%Y-%m-%d}"
    return (entry.model, f"{entry.replies:,}", format_bytes(entry.size), used)


def _row(group: "ModelGroup") -> tuple[str, ...]:
    return (
        group.model,
        group.computed_on,
        f"{group.files:,}",
        f"{group.pairs:,}",
        format_bytes(group.size),
        f"{group.last_used.astimezone():%Y-%m-%d}",
    )


def _report(reference: CacheFolder, tokens: CacheFolder, replies: CacheFolder) -> dict[str, Any]:
    from mlx_dpo.training.logps_cache import group_by_model

    return {
        "folder": str(reference.folder),
        "models": [_to_json(asdict(group)) for group in group_by_model(reference.entries)],
        **_damaged(reference),
        "tokens": {
            "folder": str(tokens.folder),
            "sources": _undamaged(tokens),
            **_damaged(tokens),
        },
        "replies": {
            "folder": str(replies.folder),
            "models": _undamaged(replies),
            **_damaged(replies),
        },
    }


def _undamaged(contents: CacheFolder) -> list[dict[str, Any]]:
    return [
        _to_json(asdict(entry) | {"path": entry.path.name})
        for entry in contents.entries
        if not entry.damaged
    ]


def _to_json(values: dict[str, Any]) -> dict[str, Any]:
    return values | {"last_used": values["last_used"].isoformat(timespec="seconds")}


def _damaged(contents: CacheFolder) -> dict[str, list[str]]:
    return {
        "damaged": [entry.path.name for entry in contents.entries if entry.damaged],
        "half_written": [path.name for path in contents.leftovers],
    }


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count:,} files"
