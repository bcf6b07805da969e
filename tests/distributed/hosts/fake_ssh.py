"""A program `ssh` for tests: runs the command on this machine in an environment of its own.

`FAKE_SSH_SAYS` makes it fail as ssh does for its own errors; `FAKE_SSH_SHELL` is the login shell.
"""

import os

SCRIPT = """#!/bin/sh
if [ -n "$FAKE_SSH_SAYS" ]; then echo "$FAKE_SSH_SAYS" >&2; exit 255; fi
while [ "$1" != -- ] && [ "${1#-}" != "$1" ]; do
  case "$1" in -o) shift 2;; *) shift;; esac
done
if [ "$1" = -- ]; then shift; fi
host=$1; shift
cd "$HOME"  # as sshd does
exec env -i HOME="$HOME" PATH=/usr/bin:/bin SSH_HOST="$host" "${FAKE_SSH_SHELL:-/bin/sh}" -c "$*"
"""
RSYNC = """#!/bin/sh
target=${3#*:}
case "$target" in /*) ;; *) target=$HOME/$target;; esac
case "$2" in */) cp -R "$2." "$target";; *) cp "$2" "$target";; esac
"""


def install(folder):
    """Write `ssh` and `rsync` to a new folder; return the PATH on which they come first."""
    folder.mkdir()
    for name, text in (("ssh", SCRIPT), ("rsync", RSYNC)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"
