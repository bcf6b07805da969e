"""Heartbeats: each rank reports to rank 0 that it works, so that the loss of one ends all.

MLX waits without end for a rank that hangs, sleeps or, with three ranks and more, died. A thread of
each rank therefore sends a message per second over a connection of its own (`control_line.py`).
Rank 0 judges the others by the rules of `lost_ranks.py`; each of the others judges rank 0. If a
rank is lost, the processes end by `os._exit`, because a thread that waits in MLX cannot be
interrupted. The run resumes from its last checkpoint.
"""

import os
import selectors
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from mlx_dpo import phases
from mlx_dpo.distributed import launcher_pipe
from mlx_dpo.distributed.control_line import Link, Listener, Message
from mlx_dpo.distributed.launcher_pipe import LOST, describe_end
from mlx_dpo.distributed.lost_ranks import RankState, find_stall, is_missing, is_silent
from mlx_dpo.io.notices import LOGGER

if TYPE_CHECKING:
    from mlx_dpo.distributed.ranks import Ranks

BEAT_SECONDS = 1.0  # between two heartbeats; less if the timeout is short
BEATS_IN_TIMEOUT = 10  # at least
AGREE_SECONDS = 1.0  # for other ranks to show the same error, or for the launcher's report
VERDICT_SECONDS = 6.0  # that an error waits for a verdict, which ends the process
INTERRUPT_SECONDS = 5.0  # that a rank has to end by itself after another one was interrupted
PRINT_SECONDS = 3.0  # that the last line may take
SIGNALLED = 128  # exit codes from here on are those of a signal


class Heartbeats:
    """The control line of this process, with a thread that sends, receives and judges."""

    def __init__(
        self, ranks: "Ranks", hosts: list[str], peer: Listener | Link, timeout: float
    ) -> None:
        """Start the thread.

        Args:
            ranks: this process among the ranks.
            hosts: names of the hosts, by rank.
            peer: in rank 0 where the others connect; in the others the connection to rank 0.
            timeout: seconds of silence after which a rank is lost.
        """
        self._ranks, self._timeout, self._pid = ranks, timeout, os.getpid()
        self._listener = peer if isinstance(peer, Listener) else None
        self._states = [RankState(f"rank {n} ({host})") for n, host in enumerate(hosts)]
        self._me = self._states[ranks.rank]
        self._links: dict[int, Link] = {} if self._listener else {0: peer}  # type: ignore[dict-item]
        self._connected = threading.Event()
        self._progress, self._phase, self._counts = 0, "", False  # of this rank
        self._step, self._checkpoint, self._command = 0, "", ""  # for the last line; of rank 0
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._outbox: list[Message] = []  # from the main thread
        self._is_sent = threading.Event()
        self._is_leaving = False  # the main thread announced its end
        self._error: tuple[float, str, int] | None = None  # first of another rank: when, text, code
        self._missing_since: float | None = None
        self._interrupted: tuple[float, int] | None = None  # when, exit code
        self._sent_interrupt = False
        threading.Thread(target=self._run, name="heartbeats", daemon=True).start()

    # --- called by the main thread -------------------------------------------------------------

    def wait_until_connected(self) -> None:
        """Wait, in rank 0, until all ranks have connected; the thread ends the process if not."""
        if self._listener is not None:
            self._connected.wait()

    def note_progress(self) -> None:
        """Count a pass, an operation or an item that was done."""
        self._progress += 1

    def note_phase(self, title: str, items: int) -> None:
        """Note the phase that this rank is in, and that `items` were done in it."""
        if title != self._phase:
            self._phase, self._counts = title, False
        self._counts |= bool(items)
        self._progress += 1

    def note(self, step: int | None, checkpoint: str | None, command: str | None) -> None:
        """Note what the last line says: step, last checkpoint, command that resumes the run."""
        self._step = self._step if step is None else step
        self._checkpoint = self._checkpoint if checkpoint is None else checkpoint
        self._command = self._command if command is None else command
        if checkpoint is not None or command is not None:  # the others know it if this rank is lost
            self._wake()

    def report_error(self, text: str, code: int) -> None:
        """Announce that this rank ends because of an error.

        Rank 0 returns, and its caller prints the error. The others wait until rank 0 has printed
        it, and end here.
        """
        self._leave({"error": text, "code": code})
        if not self._ranks.is_main:
            time.sleep(VERDICT_SECONDS)

    def leave(self, code: int) -> None:
        """Announce that this rank ends, with an exit code."""
        self._leave({"bye": code})

    def _leave(self, message: Message) -> None:
        if self._is_leaving or os.getpid() != self._pid:  # a fork has no control line
            return
        self._is_leaving = True
        self._outbox.append(message | {"operations": self._ranks.operations})
        self._wake()
        self._is_sent.wait(AGREE_SECONDS)

    def _wake(self) -> None:
        """Let the thread send a heartbeat now."""
        with suppress(OSError):
            self._wake_writer.send(b".")

    # --- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        interval = min(BEAT_SECONDS, self._timeout / BEATS_IN_TIMEOUT)
        next_beat = last_round = time.monotonic()
        while True:
            is_due = self._wait(max(0.0, next_beat - time.monotonic()))
            now = time.monotonic()
            if now - last_round > self._timeout / 2:  # this process was suspended
                for state in self._states:
                    state.seen_at = state.progressed_at = now
            last_round = now
            self._receive(now)
            if is_due or now >= next_beat:
                next_beat = now + interval
                self._beat(now)
            self._judge(now)

    def _wait(self, seconds: float) -> bool:
        """Wait for messages, or for some seconds; return whether the main thread asks to send."""
        links: list[socket.socket | Listener | Link] = [self._wake_reader]
        links += [link for link in self._links.values() if link.is_open]
        links += self._listener.links if self._listener else []
        with selectors.DefaultSelector() as selector:
            for link in links:
                selector.register(link, selectors.EVENT_READ)
            selector.select(seconds)
        with suppress(BlockingIOError):
            return bool(self._wake_reader.recv(4096))
        return False

    def _receive(self, now: float) -> None:
        for rank, link in self._listener.new_ranks() if self._listener else ():
            if 0 < rank < len(self._states) and rank not in self._links:
                self._links[rank] = link
                self._states[rank].seen_at = now
        if len(self._links) == len(self._states) - 1:
            self._connected.set()
        for rank, link in self._links.items():
            for message in link.receive():
                self._handle(self._states[rank], message, now)

    def _handle(self, state: RankState, message: Message, now: float) -> None:
        match message:
            case {"beat": beat}:
                state.update(beat, now)
                if not self._ranks.is_main:
                    self._take_over(beat)
            case {"bye": code, "operations": operations}:
                state.exit_code, state.operations, state.seen_at = code, operations, now
            case {"error": text, "code": code, "operations": operations}:
                state.exit_code, state.operations, state.seen_at = code, operations, now
                if not self._ranks.is_main:  # rank 0 prints its own
                    self._end("", code)
                self._error = self._error or (now, f"{state.name}: {text}", code)
            case {"end": code} if not self._ends_by_itself():
                self._end("", code)
            case {"interrupt": code}:
                self._interrupted = self._interrupted or (now, code)

    def _take_over(self, beat: Message) -> None:
        """Take over what a heartbeat of rank 0 has in addition."""
        self._checkpoint, self._command = beat["checkpoint"], beat["command"]
        for state, code in zip(self._states[1:], beat["exit_codes"], strict=True):
            state.exit_code = code

    def _beat(self, now: float) -> None:
        """Send a heartbeat, and the messages of the main thread."""
        beat: Message = {
            "step": self._step,
            "operations": self._ranks.operations,
            "progress": self._progress,
            "phase": self._phase,
            "counts": self._counts,
        }
        self._me.update(beat, now)
        if self._ranks.is_main:
            beat |= {
                "checkpoint": self._checkpoint,
                "command": self._command,
                "exit_codes": [state.exit_code for state in self._states[1:]],
            }
        outbox, self._outbox = self._outbox, []
        self._send({"beat": beat}, *outbox)
        if outbox:
            self._is_sent.set()

    def _send(self, *messages: Message) -> None:
        for link in self._links.values():
            for message in messages:
                if link.is_open:
                    link.send(message)

    # --- judging -------------------------------------------------------------------------------

    def _ends_by_itself(self) -> bool:
        """Return whether this is rank 0 with an end of its own; it may not have printed it yet."""
        return self._ranks.is_main and self._is_leaving

    def _judge(self, now: float) -> None:
        if self._ends_by_itself():  # the others received `end` and end as well
            return
        if self._interrupted is not None:
            self._follow_interrupt(*self._interrupted, now)
        if self._ranks.is_main:
            self._judge_error(now)
            if (stall := find_stall(self._states, now, self._timeout)) is not None:
                self._lose(*stall)
        for state in self._states if self._ranks.is_main else self._states[:1]:
            if state is not self._me:
                self._judge_rank(state, now)

    def _judge_error(self, now: float) -> None:
        """End all after another rank's error, unless rank 0 shows its own."""
        if self._error is None:
            return
        since, text, code = self._error
        if now - since > AGREE_SECONDS:
            self._end(text + (self._advice() if self._checkpoint else ""), code)

    def _judge_rank(self, state: RankState, now: float) -> None:
        rank = self._states.index(state)
        link = self._links.get(rank)
        if state.exit_code is not None:
            self._judge_end(state, now)
        elif link is None and is_silent(state, now, self._timeout):
            self._lose(state, f"did not connect within {self._timeout:.0f} s")
        elif link is not None and not link.is_open:
            status = launcher_pipe.ended_ranks.get(rank)
            if self._has_waited(now) or status is not None or not launcher_pipe.is_launched():
                self._lose(state, describe_end(status))
        elif is_silent(state, now, self._timeout):
            self._lose(state, f"has been silent for {now - state.seen_at:.0f} s")

    def _judge_end(self, state: RankState, now: float) -> None:
        """Judge a rank that announced its end."""
        assert state.exit_code is not None
        if self._is_leaving or self._error is not None:
            return
        if not is_missing(state, self._states):
            if not self._ranks.is_main and is_silent(state, now, self._timeout):
                self._end("", LOST)  # rank 0 has ended long ago
        elif state.exit_code >= SIGNALLED:
            if self._interrupted is None:
                self._interrupted = (now, state.exit_code)
                self._send({"interrupt": state.exit_code})
        elif self._has_waited(now):
            status = launcher_pipe.ended_ranks.get(self._states.index(state), state.exit_code)
            self._lose(state, f"{describe_end(status)} before the others")

    def _has_waited(self, now: float) -> bool:
        """Return whether the first call was long ago enough for the launcher's report."""
        if self._missing_since is None:
            self._missing_since = now
        return now - self._missing_since > AGREE_SECONDS

    def _follow_interrupt(self, since: float, code: int, now: float) -> None:
        """Interrupt this rank like the one that was; end the process if it waits in MLX."""
        if self._is_leaving or now - since < AGREE_SECONDS:
            return
        if not self._sent_interrupt and not launcher_pipe.stops:
            self._sent_interrupt = True
            launcher_pipe.signal_main_thread(signal.SIGINT)
        if now - since > AGREE_SECONDS + INTERRUPT_SECONDS:
            self._end("the run was interrupted" + self._advice(), code)

    # --- ending --------------------------------------------------------------------------------

    def end_without_launcher(self) -> None:
        """End this process, because the program that started it is gone."""
        if not self._is_leaving:
            self._end("the program that started the ranks was killed" + self._advice(), LOST)

    def _lose(self, state: RankState, event: str) -> None:
        """End all ranks, because one is lost."""
        step = max(state.step, self._step)  # a heartbeat is up to a second old
        self._end(f"{state.name} {event} after step {step}{self._advice()}", LOST)

    def _advice(self) -> str:
        if not self._checkpoint:
            return "; no checkpoint was saved: start the run again"
        advice = f"resume with: {self._command}" if self._command else "resume the run"
        return f"; last checkpoint: {self._checkpoint}; {advice}"

    def _end(self, line: str, code: int) -> None:
        """End all ranks now; the first one that is still there prints the line."""
        self._send({"end": code})
        running = [state for state in self._states[1:] if state.exit_code is None]
        is_first = self._ranks.is_main or (bool(running) and running[0] is self._me)
        # Standard output may be closed, and the interpreter may be ending.
        with suppress(OSError, ValueError, RuntimeError):
            # The main thread may hold a lock of the terminal for ever.
            threading.Timer(PRINT_SECONDS, os._exit, (code,)).start()
            with phases.paused():
                if line and is_first:
                    LOGGER.error("%s", line)
                sys.stdout.flush()
                os._exit(code)
        os._exit(code)


_current: Heartbeats | None = None  # of this process; None for a single process


def use(heartbeats: Heartbeats) -> None:
    """Let the functions below serve the control line of this process."""
    global _current
    _current = heartbeats


def note(
    *, step: int | None = None, checkpoint: str | None = None, command: str | None = None
) -> None:
    """Note what is printed when a rank is lost; does nothing in a single process.

    Args:
        step: optimizer step that is computed.
        checkpoint: path of the last checkpoint, in rank 0.
        command: command that resumes the run, in rank 0.
    """
    if _current is not None:
        _current.note(step, checkpoint, command)


def report_error(text: str, code: int = 1) -> None:
    """Announce an error that ends this rank; does nothing in a single process.

    It returns in rank 0, which then prints the error. In other ranks the process ends here, after
    rank 0 has printed the error, unless rank 0 is gone.
    """
    if _current is not None:
        _current.report_error(text, code)


def leave(code: int) -> None:
    """Announce the end of this rank, with its exit code; does nothing in a single process."""
    if _current is not None:
        _current.leave(code)
