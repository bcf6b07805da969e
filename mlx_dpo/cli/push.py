"""`mlx-dpo push`: upload the adapter and the model card of a run to the Hub."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_dpo.cli.command import FOLDER, Command
from mlx_dpo.cli.output import echo

if TYPE_CHECKING:
    from mlx_dpo.hub.push import Upload


@click.command(
    cls=Command,
    examples=(
        "mlx-dpo push run me/my-adapter --dry-run",
        "mlx-dpo push run me/my-adapter --public",
    ),
    renamed={"--base": "use --base-model ORG/NAME"},
)
@click.argument("run", type=FOLDER)
@click.argument("name", metavar="ORG/NAME")
@click.option("--dry-run", is_flag=True, help="Show what would be uploaded, and upload nothing.")
@click.option(
    "--public", is_flag=True, help="Make the repository public; a new one is private otherwise."
)
@click.option("--overwrite", is_flag=True, help="Replace files that the repository has.")
@click.option(
    "--also",
    multiple=True,
    metavar="FILE",
    help="Upload one more file of the run folder; repeat it for several.",
)
@click.option(
    "--base-model", "base", metavar="ORG/NAME", help="Hub id of the base model, if it is a folder."
)
def push(
    run: str,
    name: str,
    dry_run: bool,
    public: bool,
    overwrite: bool,
    also: tuple[str, ...],
    base: str | None,
) -> None:
    """Upload the adapter of RUN to ORG/NAME on the Hub: private, unless --public is given.

    Uploads the adapter, README.md (written into RUN if it is missing, also by --dry-run) and
    curves.png if it exists; not pairs, checkpoints or logs. Every file is scanned for secrets and
    personal paths before the upload. All files are in one commit, so a failure publishes nothing,
    and a retry uploads only what is missing. Log in with `hf auth login`.
    """
    from mlx_dpo.hub import push as hub
    from mlx_dpo.hub.push import prepare_upload
    from mlx_dpo.hub.run_card import make_run_card, write_card
    from mlx_dpo.models.license import CARD
    from mlx_dpo.runs.stages.find import run_folder

    folder = run_folder(run)
    if not (folder / CARD).is_file():
        card, notes = make_run_card(run, name, base=base, online=not dry_run)
        echo(f"Written to {write_card(folder, card, overwrite=False)}", err=True)
        for note in notes:
            echo(f"Note: {note}", err=True)
    else:
        _check_existing_card(folder / CARD, name, base)
    upload = prepare_upload(run, also)
    _print_files(upload)
    if dry_run:
        echo(f"\n{(folder / CARD).read_text(encoding='utf-8')}")
        echo(f"Nothing was uploaded to {name}.")
        return
    result = hub.push(
        upload.files, name, message=upload.message, public=public, overwrite=overwrite
    )
    visibility = f"{'new, ' * result.is_new}{'public' if public else 'private'}"
    state = "up to date at" if result.is_unchanged else "updated by"
    echo(f"{result.url} ({visibility}): {state} commit {result.commit[:12]}")


def _check_existing_card(path: Path, name: str, base: str | None) -> None:
    """Raise `ConfigError` if the card contradicts `--base-model` or has no repository name."""
    from mlx_dpo.errors import ConfigError

    text = path.read_text(encoding="utf-8")
    if base is not None and f"base_model: {base}\n" not in text:
        raise ConfigError(f"`--base-model` has no effect: {path} already exists; edit it there")
    if "ORG/NAME" in text:
        raise ConfigError(
            f"{path}: says `ORG/NAME` instead of `{name}`; edit it, or write it again with "
            f"`mlx-dpo card {shlex.quote(str(path.parent))} --name {name} --overwrite`"
        )


def _print_files(upload: "Upload") -> None:
    """Print size and name of each file of an upload."""
    from mlx_dpo.units import format_bytes

    for name, file in upload.files.items():
        echo(f"{format_bytes(file.stat().st_size):>10}  {name}")
