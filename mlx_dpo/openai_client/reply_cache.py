"""Cache of replies in the user's cache folder: a server is not asked for the same reply twice.

There is one file for each model at an address. A line of it is a reply under the digest of its
request, written and flushed when the reply arrives. A command that is interrupted, or whose
server dies, therefore continues with the replies that it has. Prompts are not stored, but a reply
may quote them.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from mlx_dpo.errors import DPOError, reason
from mlx_dpo.io.bounded import MAX_ROW_BYTES, open_file, parse_json, read_lines
from mlx_dpo.io.cache_listing import CacheEntry, list_cache
from mlx_dpo.io.checksums import check_line, to_checked_line
from mlx_dpo.io.locks import lock_file
from mlx_dpo.io.notices import notify_once
from mlx_dpo.openai_client.reply import Reply

VERSION = 1  # of the lines
SUFFIX = ".replies"
LOCK_RISK = "replies of two programs can be mixed up there, and are then requested again"
CONSEQUENCE = "those replies are requested again"


def request_key(model: Mapping[str, Any], body: Mapping[str, Any]) -> str:
    """Return the SHA-256 digest of a request in hex.

    Args:
        model: what the server says about the model that answers.
        body: the request.
    """
    return sha256(json.dumps([model, body], sort_keys=True).encode()).hexdigest()


class ReplyCache:
    """The stored replies of one model at an address.

    Args:
        folder: cache folder; None if replies are not stored.
        model: address with its model.
    """

    def __init__(self, folder: Path | None, model: str) -> None:
        self._model = model
        name = sha256(model.encode()).hexdigest()[:32]
        self._path = None if folder is None else folder / f"{name}{SUFFIX}"
        self._replies = {} if self._path is None else _read_replies(self._path)

    @property
    def is_stored(self) -> bool:
        """Whether replies are on disk."""
        return self._path is not None

    def get(self, key: str) -> Reply | None:
        """Return the reply to the request with this digest; None if there is none."""
        return self._replies.get(key)

    def add(self, key: str, reply: Reply) -> None:
        """Store a reply durably. If that is not possible, say so once and continue."""
        self._replies[key] = reply
        if self._path is None:
            return
        row = {"key": key, "text": reply.text, "finish_reason": reply.finish_reason}
        if reply.is_filtered:
            row["filtered"] = "yes"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Replies may quote what the user keeps private.
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            with os.fdopen(handle, "r+b") as file:
                lock_file(file, wait=True, risk=LOCK_RISK)
                _append(file, row, self._model)
        except OSError as error:
            notify_once(
                f"{self._path.parent}: replies of servers cannot be stored ({reason(error)}); "
                "if this command is interrupted, they are requested again"
            )
            self._path = None


def _append(file: IO[bytes], row: Mapping[str, str], model: str) -> None:
    """Append a row to the locked file, with the labels if it is the first, and flush it to disk."""
    _remove_half_line(file)
    data = to_checked_line(row)
    if not file.seek(0, os.SEEK_END):
        now = datetime.now(UTC).isoformat(timespec="seconds")
        data = to_checked_line({"model": model, "written": now, "version": VERSION}) + data
    file.write(data.encode())
    file.flush()
    os.fsync(file.fileno())


def _remove_half_line(file: IO[bytes]) -> None:
    """Remove an incomplete last line, which a killed process has left."""
    end = file.seek(0, os.SEEK_END)
    if not end:
        return
    file.seek(end - 1)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _read_replies(path: Path) -> dict[str, Reply]:
    """Return the replies in a file by their keys; lines that are damaged are left out and counted.

    The time stamp of a file that is read becomes the current time.
    """
    replies: dict[str, Reply] = {}
    if not os.path.lexists(path):
        return replies
    damaged = 0
    try:
        with open_file(path, DPOError) as file:
            for line in read_lines(file):
                row = _read_row(line)
                if row is None:
                    damaged += 1
                elif (reply := _to_reply(row)) is not None:
                    replies[str(row["key"])] = reply
        os.utime(path)
    except (OSError, DPOError) as error:
        notify_once(f"{path}: cannot be read ({reason(error)}); {CONSEQUENCE}")
    if damaged:
        notify_once(f"{path}: {damaged:,} damaged lines are left out; {CONSEQUENCE}")
    return replies


def _read_row(line: bytes) -> dict[str, Any] | None:
    """Return the object of a line; None if the line is not as it was written."""
    if len(line) > MAX_ROW_BYTES or not line.endswith(b"\n"):
        return None
    text = check_line(line.decode("utf-8", "replace").removesuffix("\n"))
    try:
        row = None if text is None else parse_json(text, "line", DPOError)
    except DPOError:
        return None
    return row if isinstance(row, dict) else None


def _to_reply(row: Mapping[str, Any]) -> Reply | None:
    text, finish_reason = row.get("text"), row.get("finish_reason")
    if not isinstance(text, str) or finish_reason not in ("stop", "length"):
        return None  # the labels of the file
    return Reply(text, finish_reason, row.get("filtered") == "yes")


@dataclass(frozen=True, kw_only=True)
class ReplyCacheEntry(CacheEntry):
    """The replies of a model at an address, as listed by `mlx-dpo cache`."""

    replies: int = 0


def list_entries(folder: Path) -> list[ReplyCacheEntry]:
    """Return the files of stored replies in `folder`, sorted by name."""
    return list_cache(folder, SUFFIX, ReplyCacheEntry, _read_labels)


def _read_labels(path: Path) -> dict[str, Any] | None:
    try:
        with open_file(path, DPOError) as file:
            lines = read_lines(file)
            labels = _read_row(next(lines, b""))
            count = sum(1 for _ in lines)
    except (OSError, DPOError):
        return None
    if labels is None or labels.get("version") != VERSION:
        return None
    return labels | {"replies": count}
