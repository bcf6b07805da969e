"""Lock files against other processes, where the file system can."""

import fcntl
from pathlib import Path
from typing import IO, Any

from mlx_dpo.errors import reason
from mlx_dpo.io.notices import notify_once


def lock_file(file: IO[Any], *, wait: bool, risk: str) -> None:
    """Lock an open file against other processes until it is closed.

    Some file systems, mostly network disks, have no locks. Then a notice is logged once, and the
    program continues without the lock.

    Args:
        wait: Whether to wait until another process has released the lock.
        risk: What can happen without a lock, and how to avoid it; for the notice.

    Raises:
        BlockingIOError: another process has the lock, and `wait` is False.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:  # ENOLCK, ENOTSUP, ENOSYS, EIO: it depends on the file system
        folder = Path(file.name).parent
        notify_once(f"{folder}: files cannot be locked here ({reason(error)}); {risk}")


def is_locked(path: Path) -> bool | None:
    """Return whether a process has locked the file; None if that cannot be known here.

    The file is locked for a moment if no other process has locked it.
    """
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:  # the file system has no locks, or the file is another person's
        return None
    return False
