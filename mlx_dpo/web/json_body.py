"""Read the JSON object in the body of an HTTP request, within bounds on size, depth and time."""

import socket
from http.server import BaseHTTPRequestHandler
from time import monotonic
from typing import Any

from mlx_dpo.errors import DPOError
from mlx_dpo.io.bounded import parse_json

READ_SECONDS = 60.0  # for a body to arrive
CHUNK_BYTES = 1 << 16
LINGER_SECONDS, LINGER_BYTES = 2.0, 1 << 26


class BodyError(DPOError):
    """The body of a request cannot be read; `status` is the HTTP status of the reply."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def read_json_object(handler: BaseHTTPRequestHandler, *, limit: int) -> dict[str, Any]:
    """Return the JSON object in the body of the request that `handler` handles.

    Args:
        handler: the handler, which has read the headers but nothing of the body.
        limit: largest number of bytes of a body.

    Raises:
        BodyError: the body has no length or an invalid one, is too large, arrives too slowly or
            incompletely, is not JSON, is nested too deeply, has a key twice, or is no JSON object.
    """
    length = _body_length(handler, limit)
    body = _read(handler, length)
    value = parse_json(body, "the request", BodyError, limit=limit, unique_keys=True)
    if not isinstance(value, dict):
        raise BodyError(f"the request must be a JSON object, found {type(value).__name__}")
    return value


def _body_length(handler: BaseHTTPRequestHandler, limit: int) -> int:
    """Return the length in bytes that the headers state for the body."""
    lengths = handler.headers.get_all("Content-Length", [])
    if handler.headers.get("Transfer-Encoding") is not None or not lengths:
        raise BodyError(
            "the request has no Content-Length; send the whole body with its length in it", 411
        )
    [*others, length] = (text.strip() for text in lengths)
    if others or not (length.isascii() and length.isdecimal()):
        raise BodyError(f"Content-Length must be one number, found {', '.join(lengths)[:40]!r}")
    digits = length.lstrip("0") or "0"
    if len(digits) > len(str(limit)) or int(digits) > limit:
        raise BodyError(
            f"a request body may have at most {limit:,} bytes, found {digits[:20]}", 413
        )
    return int(digits)


def _read(handler: BaseHTTPRequestHandler, length: int) -> bytes:
    """Return a body of `length` bytes; the handler's `timeout` bounds the wait for each part."""
    body, deadline = bytearray(), monotonic() + READ_SECONDS
    try:
        while len(body) < length:
            # `read` would wait for the whole body.
            part = handler.rfile.read1(min(CHUNK_BYTES, length - len(body)))
            if not part:
                raise BodyError(f"the body ended after {len(body):,} of {length:,} bytes")
            body += part
            if monotonic() > deadline:
                raise TimeoutError
    except TimeoutError:
        raise BodyError(f"the body did not arrive within {READ_SECONDS:g} seconds", 408) from None
    return bytes(body)


def linger(connection: socket.socket) -> None:
    """Read what a client still sends after the reply, for a short time, and drop it.

    Closing a connection with unread data resets it, and the client may lose the reply.
    """
    deadline, dropped = monotonic() + LINGER_SECONDS, 0
    try:
        connection.shutdown(socket.SHUT_WR)
        while (rest := deadline - monotonic()) > 0 and dropped < LINGER_BYTES:
            connection.settimeout(rest)
            if not (part := connection.recv(CHUNK_BYTES)):
                return
            dropped += len(part)
    except OSError:
        return  # the client has closed the connection
