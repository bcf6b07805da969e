"""`mlx-dpo push`: the adapter of a run and its card to the Hub."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mlx_dpo.hub.push import Parcel


@click.command()
@click.argument("run")
@click.argument("name", metavar="ORG/NAME")
@click.option("--dry-run", is_flag=True, help="Show what would be sent, and send nothing.")
@click.option("--public", is_flag=True, help="For everybody to see. [default: private]")
@click.option("--overwrite", is_flag=True, help="Replace files that the repository has.")
@click.option(
    "--also", multiple=True, metavar="FILE", help="One more file of the run folder; repeat it."
)
@click.option("--base", metavar="ORG/NAME", help="The base on the Hub, if the run names a folder.")
def push(
    run: str,
    name: str,
    dry_run: bool,
    public: bool,
    overwrite: bool,
    also: tuple[str, ...],
    base: str | None,
) -> None:
    """Send the adapter of RUN to ORG/NAME on the Hub: private, unless you say --public.

    The adapter, README.md (written into RUN if there is none, for --dry-run as well) and
    curves.png if there is one are sent; pairs, checkpoints and logs are not. Every file is
    searched for secrets and personal paths first.
    It is one commit, so that a failure leaves nothing half-published; a second try sends what is
    missing. Log in with `hf auth login`.
    """
    from mlx_dpo.hub import push as hub
    from mlx_dpo.hub.push import pack
    from mlx_dpo.hub.run_card import card_of_run, write_card
    from mlx_dpo.models.license import CARD

    folder = Path(run).expanduser()
    if not (folder / CARD).is_file():
        made, notes = card_of_run(run, name, base=base, online=not dry_run)
        click.echo(f"Written to {write_card(folder, made, overwrite=False)}", err=True)
        for note in notes:
            click.echo(f"Note: {note}", err=True)
    else:
        _refuse_other_card(folder / CARD, name, base)
    parcel = pack(run, also)
    _show(parcel)
    if dry_run:
        click.echo(f"\n{(folder / CARD).read_text(encoding='utf-8')}")
        click.echo(f"Nothing was sent to {name}.")
        return
    done = hub.push(parcel.files, name, message=parcel.message, public=public, overwrite=overwrite)
    kind = f"{'new, ' * done.is_new}{'public' if public else 'private'}"
    said = "has all of it already, in" if done.is_same else "has it in"
    click.echo(f"{done.address} ({kind}) {said} commit {done.commit[:12]}")


def _refuse_other_card(page: Path, name: str, base: str | None) -> None:
    """See that the card that is there says what is asked for."""
    from mlx_dpo.errors import ConfigError

    text = page.read_text(encoding="utf-8")
    if base is not None and f"base_model: {base}\n" not in text:
        raise ConfigError(f"`--base` has no effect: {page} is there already; mend it there")
    if "ORG/NAME" in text:
        raise ConfigError(
            f"{page}: it says `ORG/NAME` where `{name}` is meant; mend it, or make it anew with "
            f"`mlx-dpo card {page.parent} --name {name} --overwrite`"
        )


def _show(parcel: "Parcel") -> None:
    for name, file in parcel.files.items():
        click.echo(f"{file.stat().st_size:>15,} bytes  {name}")
