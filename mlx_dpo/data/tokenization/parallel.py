"""Tokenize rows in this process and, if there are many rows, in worker processes.

Pairs, their order, the counts and the first error are the same in both cases.
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

from mlx_dpo.data.files import RowLocations
from mlx_dpo.data.report import PairsReport
from mlx_dpo.data.tokenization.pair_file import Arrays, pairs_to_arrays
from mlx_dpo.data.tokenization.tokenize_rows import PairRules, new_report, tokenize_rows
from mlx_dpo.errors import DataError, DPOError
from mlx_dpo.schemas.schema import Row
from mlx_dpo.startup.jit_cache import user_environment

WORKER_PROGRAM = """
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
from mlx_dpo.data.tokenization.parallel import main
main()
"""


class TokenizedChunk(NamedTuple):
    """The tokenized pairs of a chunk of rows, as arrays, and the report on these rows."""

    arrays: Arrays
    report: PairsReport


@dataclass(frozen=True)
class WorkerSetup:
    """Everything that a worker process needs to tokenize rows."""

    load_tokenizer: Callable[[], Any]
    rules: PairRules
    locations: RowLocations


class WorkerPool:
    """Pool of worker processes that tokenize rows; leaving its context ends the processes."""

    def __init__(self, count: int, setup: WorkerSetup) -> None:
        self.count = count
        self._setup = pickle.dumps(setup)
        self._workers: list[subprocess.Popen[bytes]] = []
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()

    def __enter__(self) -> Self:
        for _ in range(self.count):
            # In a new session, so that Ctrl-C only interrupts the main process.
            worker = subprocess.Popen(
                [sys.executable, "-c", WORKER_PROGRAM],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
                env=user_environment(),
            )  # fmt: skip
            self._workers.append(worker)
            self._idle.put(worker)
            with suppress(BrokenPipeError):  # the worker has ended; `tokenize` raises the error
                _send(worker.stdin, pickle.dumps(sys.path) + self._setup)
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            with suppress(BrokenPipeError):  # rows that were not sent yet
                worker.communicate()

    def tokenize(self, rows: Sequence[Row]) -> TokenizedChunk:
        """Tokenize rows in a worker process, after waiting for an idle worker. Thread-safe.

        Raises:
            DataError, BadPairError, ConfigError: as in a single process.
        """
        worker = self._idle.get()
        try:
            _send(worker.stdin, pickle.dumps(rows))
            result = pickle.load(worker.stdout)  # type: ignore[arg-type]
        except (BrokenPipeError, EOFError):
            raise _worker_error(worker) from None
        finally:
            self._idle.put(worker)
        if isinstance(result, DPOError):
            raise result
        return TokenizedChunk(*result)


def _send(stream: IO[bytes] | None, data: bytes) -> None:
    assert stream is not None
    stream.write(data)
    stream.flush()


def _worker_error(worker: subprocess.Popen[bytes]) -> DataError:
    return DataError(
        f"tokenizing: a worker process ended unexpectedly (exit status {worker.wait()}); if memory "
        "was short, close other programs; its output is above"
    )


def main() -> None:
    """Run a worker process: read chunks of rows from stdin and write tokenized pairs to stdout.

    A `DPOError` is written as the result of its chunk.
    """
    # The output of libraries must not mix with the results.
    results, sys.stdout = sys.stdout.buffer, sys.stderr
    setup: WorkerSetup = pickle.load(sys.stdin.buffer)
    tokenizer = setup.load_tokenizer()
    while True:
        try:
            rows = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        result: TokenizedChunk | DPOError
        try:
            result = _tokenize(rows, tokenizer, setup)
        except DPOError as error:
            result = error
        _send(results, pickle.dumps(result))


def _tokenize(rows: Sequence[Row], tokenizer: Any, setup: WorkerSetup) -> TokenizedChunk:
    report = new_report("", setup.rules.tokens, setup.rules.rows)
    pairs = list(tokenize_rows(rows, tokenizer, setup.rules, report))
    return TokenizedChunk(pairs_to_arrays(pairs, setup.locations), report)


MIN_PARALLEL_ROWS = 5000  # rows before the workers are worth the time to start them
CHUNK_ROWS = 250  # rows that a worker gets at a time
CHUNKS_AHEAD = 3  # chunks per worker that are requested, so that no worker waits

Advance = Callable[[int], None]  # moves a progress bar by some rows
ChunkProgress = Callable[[], AbstractContextManager[Advance]]  # shows a progress bar


@dataclass(frozen=True)
class TokenizerWorkers:
    """A tokenizer, the number of processes, and the function that loads the tokenizer in each."""

    tokenizer: Any
    load_tokenizer: Callable[[], Any] | None = None  # can be pickled; for more than one process
    processes: int = 1


def tokenize_chunks(
    rows: Iterator[Row],
    workers: TokenizerWorkers,
    rules: PairRules,
    report: PairsReport,
    locations: RowLocations,
    progress: ChunkProgress,
) -> Iterator[Arrays]:
    """Tokenize the rows; yield the pairs in chunks, as the arrays of a pair file.

    The pairs are counted in `report`. A progress bar and worker processes are used only from row
    `MIN_PARALLEL_ROWS` on, and never with `pair_labelled`.

    Raises:
        DataError, BadPairError, ConfigError: the first error of the rows, as `load_pairs`.
    """
    # Desirable and undesirable completions of one prompt may be far apart.
    whole = rules.rows.pair_labelled
    first = rows if whole else islice(rows, MIN_PARALLEL_ROWS)
    for pairs in _chunks(tokenize_rows(first, workers.tokenizer, rules, report)):
        yield pairs_to_arrays(pairs, locations)
    following = next(rows, None)
    if following is None:
        return
    with progress() as advance:
        advance(MIN_PARALLEL_ROWS)
        rest = chain([following], rows)
        if workers.load_tokenizer is None or workers.processes == 1:
            counted = _advance_by_rows(rest, advance)
            for pairs in _chunks(tokenize_rows(counted, workers.tokenizer, rules, report)):
                yield pairs_to_arrays(pairs, locations)
            return
        setup = WorkerSetup(workers.load_tokenizer, rules, locations)
        with WorkerPool(workers.processes, setup) as pool:
            for chunk in _tokenize_in_order(_chunks(rest), pool):
                report.add(chunk.report)
                advance(chunk.report.read)
                yield chunk.arrays


def _advance_by_rows(rows: Iterable[Row], advance: Advance) -> Iterator[Row]:
    for row in rows:
        advance(1)
        yield row


def _chunks(items: Iterable[Any]) -> Iterator[Sequence[Any]]:
    """Yield lists of `CHUNK_ROWS` items; items before an error are yielded before it is raised."""
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


def _tokenize_in_order(
    chunks: Iterator[Sequence[Row]], pool: WorkerPool
) -> Iterator[TokenizedChunk]:
    """Tokenize chunks of rows in the pool; yield the results in the order of the chunks.

    An error while reading rows is raised only after the results of all earlier chunks.
    """
    waiting: deque[Future[TokenizedChunk]] = deque()
    read_error = None
    threads = ThreadPoolExecutor(pool.count)
    try:
        while read_error is None:
            try:
                waiting.append(threads.submit(pool.tokenize, next(chunks)))
            except StopIteration:
                break
            except DPOError as error:
                read_error = error
            if len(waiting) == CHUNKS_AHEAD * pool.count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)
    if read_error is not None:
        raise read_error
