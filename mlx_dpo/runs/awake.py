"""A Mac that trains should not fall asleep: `caffeinate` for as long as this process lives."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept_awake(wanted: bool) -> Iterator[str | None]:
    """Keep a Mac awake inside the block; yields what to tell the person, None elsewhere.

    Idle sleep is held off; a closed lid without power still sleeps, and the run goes on
    when it opens.
    """
    if sys.platform != "darwin" or not wanted:
        yield None
        return
    if shutil.which("caffeinate") is None:
        yield "`caffeinate` was not found; this Mac may fall asleep"
        return
    # -w: it ends with this process, whatever ends this process.
    helper = subprocess.Popen(["caffeinate", "-i", "-m", "-s", "-w", str(os.getpid())])
    try:
        yield "kept awake by `caffeinate` while it trains (--no-caffeinate turns it off)"
    finally:
        helper.terminate()
        helper.wait()
