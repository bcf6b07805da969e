"""A person's picks in a browser on this machine."""

from contextlib import suppress

import click

from mlx_dpo.conversation.collect_page import page, serve_picks
from mlx_dpo.conversation.collecting import Asked, Session
from mlx_dpo.conversation.loopback import Loopback


def in_browser(asked: Asked, port: int) -> None:
    """Serve the page until the person finishes there, or Ctrl-C here."""
    server = Loopback(page(), port)
    click.echo(f"Pick in a browser on this machine: {server.address}", err=True)
    click.echo("Keys: 1, 2 … is better, e edit, t tie, s skip, u undo, q finish", err=True)
    with suppress(KeyboardInterrupt):
        serve_picks(Session(asked), server)
