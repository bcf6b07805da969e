"""Connections of the control line: JSON messages, one per line, over TCP that never blocks.

Rank 0 listens, and the other ranks connect with a token that they received through MLX. Connections
without it are ignored. Forked processes close the connections, which would hide the end of this
process.
"""

import hmac
import json
import os
import socket
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from mlx_dpo.errors import ConfigError, reason

Message = dict[str, Any]

HELLO_SECONDS = 10.0  # that a new connection has to show the token
MAX_LINE = 2**16  # bytes of a message
MAX_BACKLOG = 2**20  # bytes that wait to be sent to a rank that does not read
MAX_STRANGERS = 64  # connections without the token at a time

_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _close_in_child() -> None:
    for each in list(_sockets):
        each.close()


os.register_at_fork(after_in_child=_close_in_child)


class Link:
    """A connection to another rank, or to a process that has not shown the token yet.

    Attributes:
        is_open: False after the other end closed the connection, or it broke.
        opened_at: time of the monotonic clock, in seconds.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _sockets.add(connection)
        self._socket = connection
        self._received, self._unsent = b"", b""
        self._messages: deque[Message] = deque()
        self.is_open = True
        self.opened_at = time.monotonic()

    def fileno(self) -> int:
        """Return the number of the socket, for `select`."""
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Send a message, or the part of it that the system takes now; `flush` sends the rest."""
        self._unsent += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send as much as the system takes."""
        try:
            while self.is_open and self._unsent:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except BlockingIOError:
            if len(self._unsent) > MAX_BACKLOG:
                self.close()
        except OSError:
            self.close()

    def receive(self) -> Iterator[Message]:
        """Yield the messages that have arrived, also those before the connection broke."""
        if self.is_open:
            self._read()
        while self._messages:
            yield self._messages.popleft()

    def _read(self) -> None:
        try:
            content = self._socket.recv(MAX_LINE)
        except BlockingIOError:
            return
        except OSError:
            content = b""
        *lines, self._received = (self._received + content).split(b"\n")
        for line in lines:
            with suppress(ValueError):  # not JSON: from a stranger
                if isinstance(message := json.loads(line), dict):
                    self._messages.append(message)
        if not content or len(self._received) > MAX_LINE:
            self.close()

    def close(self) -> None:
        """Close the connection."""
        self.is_open = False
        self._socket.close()


class Listener:
    """The socket on which rank 0 waits for the other ranks."""

    def __init__(self, address: str, token: str) -> None:
        """Listen on a free port of `address`.

        Raises:
            ConfigError: this machine does not have the address.
        """
        self._token = token
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            self._socket = socket.create_server((address, 0), family=family, backlog=MAX_STRANGERS)
        except OSError as error:
            raise ConfigError(
                f"rank 0: cannot listen on {address} ({reason(error)}); the first address of the "
                "host file must be one of this machine"
            ) from error
        _sockets.add(self._socket)
        self._socket.setblocking(False)
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        self._strangers: list[Link] = []

    @property
    def links(self) -> list["Listener | Link"]:
        """What `select` has to wait for."""
        return [self, *self._strangers]

    def fileno(self) -> int:
        """Return the number of the socket, for `select`."""
        return self._socket.fileno()

    def new_ranks(self) -> Iterator[tuple[int, Link]]:
        """Yield ranks that have connected and shown the token; close connections without it."""
        with suppress(BlockingIOError, ConnectionError):
            self._strangers.append(Link(self._socket.accept()[0]))
            if len(self._strangers) > MAX_STRANGERS:
                self._strangers.pop(0).close()
        for link in list(self._strangers):
            hello = next(link.receive(), None)
            rank = None if hello is None else self._rank_of(hello)
            if rank is not None:
                self._strangers.remove(link)
                yield rank, link
            elif hello is not None or self._is_over(link):
                self._strangers.remove(link)
                link.close()

    def _rank_of(self, hello: Message) -> int | None:
        token, rank = hello.get("token"), hello.get("rank")
        if not isinstance(token, str) or not isinstance(rank, int):
            return None
        return rank if hmac.compare_digest(token.encode(), self._token.encode()) else None

    def _is_over(self, link: Link) -> bool:
        return not link.is_open or time.monotonic() - link.opened_at > HELLO_SECONDS

    def close(self) -> None:
        """Take no more connections."""
        for link in self._strangers:
            link.close()
        self._socket.close()


def connect_to(address: tuple[str, int], rank: int, token: str, timeout: float) -> Link:
    """Connect to rank 0 and show the token.

    Raises:
        ConfigError: rank 0 cannot be reached.
    """
    try:
        link = Link(socket.create_connection(address, timeout))
    except OSError as error:
        raise ConfigError(
            f"rank {rank}: rank 0 cannot be reached at {address[0]} port {address[1]} "
            f"({reason(error)}); let a firewall pass all ports between the hosts"
        ) from error
    link.send({"token": token, "rank": rank})
    return link
