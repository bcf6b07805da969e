"""A command of ours under a terminal of its own: type, wait, press Ctrl-C, resize."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time


class Session:
    """`mlx-dpo` with these words, at a terminal of 80 columns."""

    def __init__(self, *words, **env):
        self.seen, self._screen = "", b""
        self._master, terminal = pty.openpty()
        self.resize(80)
        self._child = subprocess.Popen(
            [sys.executable, "-c", "from mlx_dpo.cli import main; main()", *words],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            env=os.environ | {"TERM": "dumb", "INPUTRC": os.devnull} | env,
            preexec_fn=_own_terminal,
        )
        os.close(terminal)

    def until(self, pattern, seconds=60):
        """Read on until `pattern` appears after what was seen before; returns what came."""
        deadline = time.monotonic() + seconds
        start = len(self.seen)
        while not (found := re.search(pattern, self.seen[start:])):
            assert time.monotonic() < deadline, f"{pattern!r} not in {self.seen[start:]!r}"
            self._read(0.2)
        return self.seen[start : start + found.end()]

    def _read(self, seconds):
        if select.select([self._master], [], [], seconds)[0]:
            try:
                self._screen += os.read(self._master, 4096)
            except OSError:  # Linux says so when the other side has closed
                return
            self.seen = self._screen.decode("utf-8", "ignore").replace("\r\n", "\n")

    def type(self, text):
        os.write(self._master, text.encode())

    def say(self, text, pattern="> $"):
        """Type a line and read until the pattern; returns what came."""
        self.type(text + "\n")
        return self.until(pattern)

    def resize(self, columns):
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def exit_code(self):
        code = None
        while code is None:
            self._read(0.05)
            code = self._child.poll()
        return code

    def close(self):
        self._child.kill()
        self._child.wait()
        os.close(self._master)


def _own_terminal():
    """Make the terminal the controlling one, so that Ctrl-C reaches the child as a signal."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
