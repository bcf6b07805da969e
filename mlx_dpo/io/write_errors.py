"""Errors of the disk: the file that could not be written or read, the cause, and what to do."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PERMISSIONS = "check its permissions, or choose another place"
ADVICE = {
    errno.ENOSPC: "free some space, or choose another disk",
    errno.EDQUOT: "free some space, or choose another disk",
    errno.EFBIG: "raise the limit of this shell (`ulimit -f`), or choose another disk",
    errno.EROFS: "choose another place",
    errno.EACCES: PERMISSIONS,
    errno.EPERM: PERMISSIONS,
    errno.EIO: "check the disk and its connection",
}
PROBE_BYTES = 1 << 20


def describe_disk_error(error: OSError) -> str | None:
    """Return an error of the disk as `file: cause; advice`, or None for any other error."""
    if error.errno not in ADVICE:
        return None
    where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
    return f"{where}{error.strerror}; {ADVICE[error.errno]}"


def advice_on(error: OSError) -> str:
    """Return what to do about an error of writing."""
    return ADVICE.get(error.errno or 0, "check the disk, or choose another place")


@contextmanager
def name_file(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Add the name of a file to errors of the disk in the block that name none.

    A failed `write` does not know its file; only a failed `open` does.

    Args:
        path: the file or folder that is being written.
        temporary: its temporary name, which is replaced in errors.
    """
    try:
        yield
    except OSError as error:
        if error.errno in ADVICE:
            error.filename = _final_name(error.filename, path, temporary)
        raise


def _final_name(name: str | bytes | int | None, path: Path, temporary: Path | None) -> str:
    if name is None or isinstance(name, int):
        return str(path)
    written = Path(os.fsdecode(name))
    if temporary is None or not written.is_relative_to(temporary):
        return str(written)
    return str(path / written.relative_to(temporary))


def find_write_error(path: Path, message: str) -> OSError:
    """Return why a library could not write a file, by a try to write to it.

    Args:
        path: the file, or the folder in which a file could not be written.
        message: message of the library, for a cause that cannot be found any more.
    """
    file = path / f".mlx-dpo-{os.getpid()}-probe" if path.is_dir() else path
    existed = file.exists()
    try:
        with file.open("ab") as stream:
            stream.write(bytes(PROBE_BYTES))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        cause = error.errno or errno.EIO
        return OSError(cause, os.strerror(cause), str(path))
    finally:
        if not existed:
            file.unlink(missing_ok=True)
    # The cause is gone, for instance because the space has become free.
    return OSError(errno.EIO, message.rstrip("."), str(path))
