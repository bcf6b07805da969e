"""Warnings that library code logs for the user, through Python's logging.

The command line prints them to stderr as `Warning: …`. In a notebook the `mlx_dpo` logger prints
them, and can be silenced like any other logger.
"""

import logging
from functools import cache

LOGGER = logging.getLogger("mlx_dpo")


def notify(message: str) -> None:
    """Log a warning: something works differently than requested, and the program continues."""
    LOGGER.warning("%s", message)


@cache
def notify_once(message: str) -> None:
    """Log a warning, unless this process has logged the same message before."""
    notify(message)
