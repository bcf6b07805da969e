"""Open a page in the browser of the person at this machine, if there is a screen for it."""

import os
import sys
import webbrowser


def open_in_browser(url: str) -> bool:
    """Open `url` in the default browser; return False if there is no screen or no browser.

    Without a screen (over SSH, or on Linux without a display server) nothing is started: a text
    browser would take over the terminal, and another person's screen is not the place.
    """
    if not has_screen():
        return False
    try:
        return webbrowser.open(url)
    except webbrowser.Error:
        return False


def has_screen() -> bool:
    """Return whether this process can show windows to the person who started it."""
    if os.environ.get("SSH_CONNECTION"):
        return False
    if sys.platform == "darwin":
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
