"""Serve a live report of runs, for `report --live` and `train --live`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mlx_dpo.cli.output import echo


@contextmanager
def serve_live_report(
    folders: Sequence[str], *, x_axis: str = "step", port: int = 0, open_browser: bool = True
) -> Iterator[None]:
    """Serve the live report of runs inside the block, and open it in a browser.

    Without a screen or a browser only the address is printed.

    Raises:
        ConfigError: the port is in use, or a folder is named twice.
        RunError: a folder is that of a model.
    """
    from mlx_dpo.saved_runs.live_report import LiveReport, ReportServer
    from mlx_dpo.web.browser import open_in_browser

    server = ReportServer(LiveReport(folders, x_axis), port)
    with server.running():
        is_open = open_browser and open_in_browser(server.url)
        note = "opened in the browser" if is_open else "open it in a browser on this machine"
        echo(f"Live report ({note}): {server.url}", err=True)
        try:
            yield
        finally:
            server.finish()
