"""Connections of the control line: who may connect, and what a broken one leaves."""

import json
import os
import socket
import time

import pytest

from mlx_dpo.distributed import control_line
from mlx_dpo.distributed.control_line import Listener, connect_to
from mlx_dpo.errors import ConfigError

LOOPBACK = "127.0.0.1"


@pytest.fixture
def listener():
    listener = Listener(LOOPBACK, "right")
    yield listener
    listener.close()


def accepted(listener, seconds=5.0):
    """Return the ranks that connect within some time."""
    found, deadline = [], time.monotonic() + seconds
    while time.monotonic() < deadline and not found:
        found += listener.new_ranks()
        time.sleep(0.01)
    return found


def check_that_a_rank_gets_in(listener):
    link = connect_to(listener.address, 1, "right", 5.0)
    [(rank, received)] = accepted(listener)
    assert rank == 1
    received.close()
    link.close()


def test_a_rank_connects_by_the_token_and_its_messages_arrive(listener):
    link = connect_to(listener.address, 2, "right", 5.0)
    link.send({"beat": 1})
    link.send({"bye": 0})
    [(rank, received)] = accepted(listener)
    assert rank == 2
    link.close()
    messages = []
    while received.is_open:
        messages += received.receive()
    assert messages == [{"beat": 1}, {"bye": 0}]


@pytest.mark.parametrize(
    "hello",
    [
        b'{"token": "wrong", "rank": 1}\n',
        b'{"token": 1, "rank": 1}\n',
        b'{"token": "right", "rank": "1"}\n',
        b"[]\n{}\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 100_000,
        b"",
    ],
)
def test_a_stranger_is_ignored(listener, monkeypatch, hello):
    monkeypatch.setattr(control_line, "HELLO_SECONDS", 0.2)
    with socket.create_connection(listener.address) as stranger:
        stranger.sendall(hello)
        assert accepted(listener, 0.4) == []
        assert listener.links == [listener]  # its connection was closed
        check_that_a_rank_gets_in(listener)


def test_many_strangers_do_not_keep_a_rank_out(listener):
    strangers = []
    try:
        for _ in range(2 * control_line.MAX_STRANGERS):
            strangers.append(socket.create_connection(listener.address))
            list(listener.new_ranks())
        assert len(listener.links) == 1 + control_line.MAX_STRANGERS
        check_that_a_rank_gets_in(listener)
    finally:
        for stranger in strangers:
            stranger.close()


def test_a_rank_that_does_not_read_is_dropped(listener, monkeypatch):
    monkeypatch.setattr(control_line, "MAX_BACKLOG", 1000)
    deaf = connect_to(listener.address, 1, "right", 5.0)
    [(_, link)] = accepted(listener)
    for _ in range(10_000):
        link.send({"text": "x" * 1000})
        if not link.is_open:
            break
    assert not link.is_open
    deaf.close()


def test_a_fork_does_not_keep_the_connection_open(listener):
    link = connect_to(listener.address, 1, "right", 5.0)
    [(_, received)] = accepted(listener)
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:  # it would hide the end of this process
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    try:
        link.close()
        deadline = time.monotonic() + 5
        while received.is_open and time.monotonic() < deadline:
            list(received.receive())
        assert not received.is_open
    finally:
        os.close(writer)
        os.close(reader)
        os.waitpid(child, 0)


def test_what_cannot_be_reached_is_named():
    with socket.create_server((LOOPBACK, 0)) as server:
        address = server.getsockname()
    with pytest.raises(ConfigError, match=rf"rank 1: .* {LOOPBACK} port {address[1]} \(Connection"):
        connect_to(address, 1, json.dumps("token"), 1.0)
    with pytest.raises(ConfigError, match=r"rank 0: cannot listen on 192\.0\.2\.1"):
        Listener("192.0.2.1", "right")
