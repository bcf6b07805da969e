"""Rows -> tokenized pairs with a report, in this process and, where they are many, in others.

Whichever does it, pairs, order, counts and the first error are the same.
"""

import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from queue import SimpleQueue
from typing import IO, Any, NamedTuple, Self

from mlx_dpo.data.dataset import Arrays, RowLocations, pairs_to_arrays
from mlx_dpo.data.load import PairRules, new_report, tokenize_rows
from mlx_dpo.data.report import PairsReport
from mlx_dpo.errors import DataError, DPOError
from mlx_dpo.schemas.schema import Row

WORKER_PROGRAM = """
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
from mlx_dpo.data.tokenization.parallel import main
main()
"""


class TokenizedChunk(NamedTuple):
    """What became of some rows."""

    arrays: Arrays
    report: PairsReport


@dataclass(frozen=True)
class WorkerSetup:
    """What a process has to know."""

    load: Callable[[], Any]  # the tokenizer
    rules: PairRules
    places: RowLocations


class WorkerPool:
    """So many processes; they end with the block."""

    def __init__(
        self, count: int, load: Callable[[], Any], rules: PairRules, places: RowLocations
    ) -> None:
        self.count = count
        self._job = pickle.dumps(WorkerSetup(load, rules, places))
        self._all: list[subprocess.Popen[bytes]] = []
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()

    def __enter__(self) -> Self:
        for _ in range(self.count):
            # A session of its own: Ctrl-C is for the process that waits for this one.
            worker = subprocess.Popen(
                [sys.executable, "-c", WORKER_PROGRAM],
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

    def ask(self, rows: Sequence[Row]) -> TokenizedChunk:
        """What becomes of these rows; waits for a process that is free. From any thread.

        Raises:
            DataError, BadPairError, ConfigError: what one process would have raised.
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
        return TokenizedChunk(*answer)


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
    job: WorkerSetup = pickle.load(sys.stdin.buffer)
    tokenizer = job.load()
    while True:
        try:
            rows = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer: TokenizedChunk | DPOError
        try:
            answer = _answer(rows, tokenizer, job)
        except DPOError as error:
            answer = error
        _send(answers, pickle.dumps(answer))


def _answer(rows: Sequence[Row], tokenizer: Any, job: WorkerSetup) -> TokenizedChunk:
    report = new_report("", job.rules.tokens, job.rules.rows)
    pairs = list(tokenize_rows(rows, tokenizer, job.rules, report))
    return TokenizedChunk(pairs_to_arrays(pairs, job.places), report)


MIN_PARALLEL_ROWS = 5000  # rows that are done before other processes are worth their start
CHUNK_ROWS = 250  # rows that one of them is given at a time
CHUNKS_AHEAD = 3  # chunks for each, so that none waits

Advance = Callable[[int], None]
ChunkProgress = Callable[[], AbstractContextManager[Advance]]  # of rows, how ever many they are


@dataclass(frozen=True)
class TokenizerWorkers:
    """Who tokenizes: this process, or so many others, which load the tokenizer themselves."""

    tokenizer: Any
    load: Callable[[], Any]  # to be pickled
    processes: int = 1


def tokenize_chunks(
    rows: Iterator[Row],
    hands: TokenizerWorkers,
    rules: PairRules,
    report: PairsReport,
    places: RowLocations,
    counting: ChunkProgress,
) -> Iterator[Arrays]:
    """Everything that a store holds of the rows' pairs, in order; `report` counts.

    Raises:
        DataError, BadPairError, ConfigError: as `load_pairs`, the first that there is.
    """
    whole = rules.rows.pair_labelled  # answers meet others from far away
    few = rows if whole else islice(rows, MIN_PARALLEL_ROWS)
    for chunk in _chunks(tokenize_rows(few, hands.tokenizer, rules, report)):
        yield pairs_to_arrays(chunk, places)
    more = next(rows, None)
    if more is None:
        return
    with counting() as heard:
        heard(MIN_PARALLEL_ROWS)
        rest = chain([more], rows)
        if hands.processes == 1:
            counted = _counted(rest, heard)
            for chunk in _chunks(tokenize_rows(counted, hands.tokenizer, rules, report)):
                yield pairs_to_arrays(chunk, places)
            return
        with WorkerPool(hands.processes, hands.load, rules, places) as workers:
            for answer in _asked(_chunks(rest), workers):
                report.add(answer.report)
                heard(answer.report.read)
                yield answer.arrays


def _counted(rows: Iterable[Row], heard: Advance) -> Iterator[Row]:
    for row in rows:
        heard(1)
        yield row


def _chunks(items: Iterable[Any]) -> Iterator[Sequence[Any]]:
    """So many at a time. Those that come before an error come before it."""
    chunk: list[Any] = []
    try:
        for item in items:
            chunk.append(item)
            if len(chunk) == CHUNK_ROWS:
                yield chunk
                chunk = []
    except DPOError:
        yield chunk
        raise
    yield chunk


def _asked(chunks: Iterator[Sequence[Row]], workers: WorkerPool) -> Iterator[TokenizedChunk]:
    """Answers in the order of the chunks; what cannot be read is raised behind all before it."""
    waiting: deque[Future[TokenizedChunk]] = deque()
    unreadable = None
    threads = ThreadPoolExecutor(workers.count)
    try:
        while unreadable is None:
            try:
                waiting.append(threads.submit(workers.ask, next(chunks)))
            except StopIteration:
                break
            except DPOError as error:
                unreadable = error
            if len(waiting) == CHUNKS_AHEAD * workers.count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)
    if unreadable is not None:
        raise unreadable
