"""Other processes that make rows into pairs: each loads the tokenizer, none imports the caller.

They are started afresh, as `multiprocessing` does with `spawn`, but for one thing: that imports
the program's main file again in each, and so runs every script that has no guard for it.
"""

import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import IO, Any, NamedTuple, Self

from mlx_dpo.errors import DataError, DPOError
from mlx_dpo.preferences.pairs import PairRules, new_report, pairs_of_rows
from mlx_dpo.preferences.report import PairsReport
from mlx_dpo.preferences.rows import Row
from mlx_dpo.preferences.store import Arrays, Places, arrays_of

PROGRAM = """
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
from mlx_dpo.preferences.workers import main
main()
"""


class Answer(NamedTuple):
    """What became of some rows."""

    arrays: Arrays
    report: PairsReport


@dataclass(frozen=True)
class Job:
    """What a process has to know."""

    load: Callable[[], Any]  # the tokenizer
    rules: PairRules
    places: Places


class Workers:
    """So many processes; they end with the block."""

    def __init__(
        self, count: int, load: Callable[[], Any], rules: PairRules, places: Places
    ) -> None:
        self.count = count
        self._job = pickle.dumps(Job(load, rules, places))
        self._all: list[subprocess.Popen[bytes]] = []
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()

    def __enter__(self) -> Self:
        for _ in range(self.count):
            # A session of its own: Ctrl-C is for the process that waits for this one.
            worker = subprocess.Popen(
                [sys.executable, "-c", PROGRAM],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
            self._all.append(worker)
            self._idle.put(worker)
            with suppress(BrokenPipeError):  # it is gone; whoever asks it will be told
                _send(worker.stdin, pickle.dumps(sys.path) + self._job)
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._all:
            worker.kill()
        for worker in self._all:
            with suppress(BrokenPipeError):  # what it was being told when it ended
                worker.communicate()

    def ask(self, rows: Sequence[Row]) -> Answer:
        """What becomes of these rows; waits for a process that is free. From any thread.

        Raises:
            DataError, BadPair, ConfigError: what one process would have raised.
        """
        worker = self._idle.get()
        try:
            _send(worker.stdin, pickle.dumps(rows))
            answer = pickle.load(worker.stdout)  # type: ignore[arg-type]
        except (BrokenPipeError, EOFError):
            raise _gone(worker) from None
        finally:
            self._idle.put(worker)
        if isinstance(answer, DPOError):
            raise answer
        return Answer(*answer)


def _send(stream: IO[bytes] | None, data: bytes) -> None:
    assert stream is not None
    stream.write(data)
    stream.flush()


def _gone(worker: subprocess.Popen[bytes]) -> DataError:
    return DataError(
        f"tokenizing: a process that helps ended by itself (exit status {worker.wait()}); if "
        "memory was short, close other programs; what it said stands above"
    )


def main() -> None:
    """Answer until nothing more is asked. Errors are answers too."""
    # Whatever a library prints must not come between the answers.
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    job: Job = pickle.load(sys.stdin.buffer)
    tokenizer = job.load()
    while True:
        try:
            rows = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer: Answer | DPOError
        try:
            answer = _answer(rows, tokenizer, job)
        except DPOError as error:
            answer = error
        _send(answers, pickle.dumps(answer))


def _answer(rows: Sequence[Row], tokenizer: Any, job: Job) -> Answer:
    report = new_report("", job.rules.tokens, job.rules.rows)
    pairs = list(pairs_of_rows(rows, tokenizer, job.rules, report))
    return Answer(arrays_of(pairs, job.places), report)
