"""Read files, lines, archives and JSON within bounds on size and depth.

Whatever a user names or sends may be a pipe that never ends, a device, a loop of links, a small
archive that unpacks to terabytes, or JSON nested a million times. The functions here refuse such
input before it fills the memory or blocks the program. Each takes the class of the exception that
it raises, so that a caller reports its own kind of error.
"""

import errno
import io
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, NoReturn

from mlx_dpo.errors import DPOError, reason
from mlx_dpo.units import format_bytes

MAX_ROW_BYTES = 32_000_000  # of a row, as text or in memory; a million tokens are about 5 MB
MAX_FILE_BYTES = 64_000_000  # of a file that is read whole: settings, records, prompts, templates
BLOCK_BYTES = 1 << 20  # that are read at a time
MAX_NESTING = 128  # of lists and objects in each other
MAX_DIGITS = 300  # of an integer; a float has at most 309
UNPACKED_FREE = 250_000_000  # bytes that every archive may unpack to
UNPACKED_RATIO = 100  # further bytes per packed byte; repetitive text reaches about 20

PIPE_FOLDERS = (Path("/dev/fd"), Path("/proc/self/fd"))  # of the pipes that a shell names
STANDARD_INPUT = Path("/dev/stdin")
FILE_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
NAME_ERRORS = {
    errno.ENOENT: "no such file",
    errno.ENOTDIR: "no such file",
    errno.ENAMETOOLONG: "the name is too long for a file",
    errno.ELOOP: "a loop of symbolic links",
}


class _RefusedJSONError(ValueError):
    """JSON has an integer of more than `MAX_DIGITS` digits, or a repeated key."""


def open_file(path: Path, error: type[DPOError], *, accept_pipe: bool = False) -> BinaryIO:
    """Open a regular file for reading bytes, without waiting for the writer of a pipe.

    With `accept_pipe`, `/dev/stdin` and the pipes of a shell's `<(command)` are opened, too.

    Raises:
        error: there is no such file, it cannot be read, or it is a folder, a pipe or a device.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as failed:
        _raise_unreadable(path, failed, error)
    except ValueError:  # a NUL character ends a name for the system
        shown = str(path).replace("\0", "\\0")
        raise error(f"{shown}: the name contains a NUL character; fix the name") from None
    kind = stat.S_IFMT(os.fstat(handle).st_mode)
    from_shell = accept_pipe and (path.parent in PIPE_FOLDERS or path == STANDARD_INPUT)
    if kind != stat.S_IFREG and not (from_shell and kind != stat.S_IFDIR):
        os.close(handle)
        raise error(f"{path}: is {FILE_KINDS.get(kind, 'no regular file')}; give a file")
    os.set_blocking(handle, True)
    return os.fdopen(handle, "rb")


def read_bytes(
    path: Path, error: type[DPOError], *, limit: int = MAX_FILE_BYTES, accept_pipe: bool = False
) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    With `accept_pipe`, `/dev/stdin` and the pipes of a shell's `<(command)` are read, too.

    Raises:
        error: the file cannot be read, is no regular file, or is larger.
    """
    with open_file(path, error, accept_pipe=accept_pipe) as file:
        try:
            data = file.read(limit + 1)
        except OSError as failed:
            _raise_unreadable(path, failed, error)
    if len(data) > limit:
        raise error(f"{path}: larger than {format_bytes(limit)}; give another file")
    return data


def read_text(
    path: Path, error: type[DPOError], *, limit: int = MAX_FILE_BYTES, accept_pipe: bool = False
) -> str:
    """Return the text of a regular file; see `read_bytes`. A byte order mark is removed.

    Raises:
        error: as `read_bytes`, or the file is not UTF-8.
    """
    return decode(read_bytes(path, error, limit=limit, accept_pipe=accept_pipe), str(path), error)


def read_json(path: Path, error: type[DPOError], *, limit: int = MAX_FILE_BYTES) -> Any:
    """Return the value of a JSON file; see `read_bytes` and `parse_json`.

    Raises:
        error: the file cannot be read within its bounds, or is not JSON.
    """
    return parse_json(read_bytes(path, error, limit=limit), str(path), error, limit=limit)


def decode(data: bytes, location: str, error: type[DPOError]) -> str:
    """Return UTF-8 data as text, without a byte order mark.

    Args:
        data: the bytes.
        location: what an error message begins with, such as `file:12`.
        error: class of the exception.

    Raises:
        error: the data is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as failed:
        byte = data[failed.start]
        raise error(
            f"{location}: not UTF-8 (byte 0x{byte:02x} at {failed.start}); save the file as UTF-8"
        ) from None


def parse_json(
    data: bytes | str,
    location: str,
    error: type[DPOError],
    *,
    limit: int = MAX_ROW_BYTES,
    unique_keys: bool = False,
) -> Any:
    """Return the value of JSON data of at most `limit` bytes (characters, if it is text).

    Args:
        data: the JSON data.
        location: what an error message begins with, such as `file:12`.
        error: class of the exception.
        limit: maximum length of the data.
        unique_keys: refuse an object with the same key twice; otherwise the last value counts.

    Raises:
        error: the data is not JSON or not UTF-8, is too long, is nested more than `MAX_NESTING`
            times, or has an integer of more than `MAX_DIGITS` digits or a repeated key.
    """
    if len(data) > limit:
        raise error(f"{location}: longer than {format_bytes(limit)}; shorten it or leave it out")
    text = data if isinstance(data, str) else decode(data, location, error)
    try:
        pairs_hook = _unique_object if unique_keys else None
        value = json.loads(text, parse_int=_parse_int, object_pairs_hook=pairs_hook)
    except json.JSONDecodeError as failed:
        at = f"line {failed.lineno}, " if failed.lineno > 1 else ""
        raise error(f"{location}: not JSON ({failed.msg}, {at}column {failed.colno})") from None
    except _RefusedJSONError as failed:
        raise error(f"{location}: {failed}") from None
    except RecursionError:
        _raise_nested(location, error)
    if text.count("[") + text.count("{") > MAX_NESTING:
        check_nesting(value, location, error)
    return value


def check_nesting(value: Any, location: str, error: type[DPOError]) -> None:
    """Raise `error` if lists and objects are nested more than `MAX_NESTING` times."""
    level = [value]
    for _ in range(MAX_NESTING + 1):
        containers = [item for item in level if isinstance(item, dict | list | tuple)]
        if not containers:
            return
        level = [
            item
            for container in containers
            for item in (container.values() if isinstance(container, dict) else container)
        ]
    _raise_nested(location, error)


def read_lines(stream: IO[bytes], limit: int = MAX_ROW_BYTES) -> Iterator[bytes]:
    """Yield the lines of a stream with their newlines; only a newline ends a line.

    Of a line that is longer than `limit`, the first `limit + 1` bytes are yielded and the others
    skipped, so that `parse_json` refuses it and further lines have their own numbers.
    """
    while line := stream.readline(limit + 1):
        yield line
        skip_rest(stream, line, limit)


def read_at_most(stream: IO[bytes], limit: int) -> bytes:
    """Return the next bytes of a stream, at most `limit`.

    `stream.read(limit)` would reserve memory for `limit` bytes first, however few there are.
    """
    content = io.BytesIO()
    while block := stream.read(min(BLOCK_BYTES, limit - content.tell())):
        content.write(block)
    return content.getvalue()


def skip_rest(stream: IO[bytes], line: bytes, limit: int = MAX_ROW_BYTES) -> None:
    """Skip the rest of a line of which `readline(limit + 1)` returned the beginning `line`."""
    while len(line) > limit and not line.endswith(b"\n"):
        line = stream.readline(limit + 1)


class UnpackedStream(io.RawIOBase):
    """Bytes of an archive, unpacked while they are read, up to a bound.

    Raises:
        error: while reading, if the archive unpacks to more than `UNPACKED_FREE` bytes and
            `UNPACKED_RATIO` times its size.
    """

    def __init__(
        self, unpacked: IO[bytes], path: Path, packed_bytes: float, error: type[DPOError]
    ) -> None:
        """Wrap the stream `unpacked` of the archive `path`, which has `packed_bytes` bytes."""
        self._unpacked, self._path, self._error = unpacked, path, error
        self._limit = UNPACKED_FREE + UNPACKED_RATIO * packed_bytes
        self._position = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return whether the unpacked stream can seek."""
        return self._unpacked.seekable()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position of the unpacked stream, within the bound."""
        if whence == os.SEEK_END:  # the stream would unpack everything to find its end
            while self.read(BLOCK_BYTES):
                pass
        self._position = self._unpacked.seek(offset, whence)
        self._check()
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with unpacked bytes and return their number."""
        data = self._unpacked.read(len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        self._check()
        return len(data)

    def _check(self) -> None:
        if self._position > self._limit:
            raise self._error(
                f"{self._path}: decompresses to more than {format_bytes(self._limit)}, which is "
                "not plausible for text; decompress it and give the file inside"
            )


def _parse_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS + 1:  # a sign
        raise _RefusedJSONError(
            f"a number of {len(digits)} digits (at most {MAX_DIGITS}); shorten the number"
        )
    return int(digits)


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        [(repeated, _)] = Counter(name for name, _ in pairs).most_common(1)
        shown = repeated.encode("ascii", "backslashreplace").decode()[:80]
        raise _RefusedJSONError(f"`{shown}` occurs twice in one object; keep one of them")
    return entries


def _raise_nested(location: str, error: type[DPOError]) -> NoReturn:
    raise error(
        f"{location}: nested too deeply (more than {MAX_NESTING} nested lists and objects)"
    ) from None


def _raise_unreadable(path: Path, failed: OSError, error: type[DPOError]) -> NoReturn:
    if failed.errno in NAME_ERRORS:
        raise error(f"{path}: {NAME_ERRORS[failed.errno]}") from failed
    if failed.errno == errno.EISDIR:
        raise error(f"{path}: is a folder; give a file") from failed
    raise error(f"{path}: cannot be read ({reason(failed)})") from failed
