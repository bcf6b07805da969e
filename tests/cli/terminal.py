"""Run `mlx-dpo` in a pseudo-terminal: type, wait for output, press Ctrl-C, resize."""

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


class TerminalSession:
    """A process of `mlx-dpo` with the given arguments, at a terminal of 80 columns."""

    program = "from mlx_dpo.cli import main; main()"

    def __init__(self, *arguments, **env):
        self.output, self._bytes = "", b""
        self._master, terminal = pty.openpty()
        self.resize(80)
        self._child = subprocess.Popen(
            [sys.executable, "-c", self.program, *arguments],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            env=os.environ | {"TERM": "dumb", "INPUTRC": os.devnull} | env,
            preexec_fn=_own_terminal,
        )
        os.close(terminal)

    def until(self, pattern, seconds=60):
        """Read until `pattern` appears in new output; return the new output."""
        deadline = time.monotonic() + seconds
        start = len(self.output)
        while not (match := re.search(pattern, self.output[start:])):
            assert time.monotonic() < deadline, f"{pattern!r} not in {self.output[start:]!r}"
            self._read(0.2)
        return self.output[start : start + match.end()]

    def _read(self, seconds):
        if select.select([self._master], [], [], seconds)[0]:
            try:
                self._bytes += os.read(self._master, 4096)
            except OSError:  # Linux raises it when the process has closed the terminal
                return
            self.output = self._bytes.decode("utf-8", "ignore").replace("\r\n", "\n")

    def type(self, text):
        os.write(self._master, text.encode())

    def type_line(self, text, pattern="> $"):
        """Type a line and read until the pattern; return the new output."""
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
    """Make the terminal the controlling terminal, so that Ctrl-C sends the child a signal."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
