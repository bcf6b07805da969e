"""Rows -> tokenized pairs with a report, in this process and, where they are many, in others.

Whichever does it, pairs, order, counts and the first error are the same.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from mlx_dpo.errors import DPOError
from mlx_dpo.preferences.pairs import PairRules, pairs_of_rows
from mlx_dpo.preferences.report import PairsReport
from mlx_dpo.preferences.rows import Row
from mlx_dpo.preferences.store import Arrays, Places, arrays_of
from mlx_dpo.preferences.workers import Answer, Workers

ALONE = 5000  # rows that are done before other processes are worth their start
CHUNK = 250  # rows that one of them is given at a time
AHEAD = 3  # chunks for each, so that none waits

Heard = Callable[[int], None]
Counting = Callable[[], AbstractContextManager[Heard]]  # of rows, how ever many they are


@dataclass(frozen=True)
class Hands:
    """Who tokenizes: this process, or so many others, which load the tokenizer themselves."""

    tokenizer: Any
    load: Callable[[], Any]  # to be pickled
    processes: int = 1


def blocks(
    rows: Iterator[Row],
    hands: Hands,
    rules: PairRules,
    report: PairsReport,
    places: Places,
    counting: Counting,
) -> Iterator[Arrays]:
    """Everything that a store holds of the rows' pairs, in order; `report` counts.

    Raises:
        DataError, BadPair, ConfigError: as `load_pairs`, the first that there is.
    """
    whole = rules.rows.pair_labelled  # answers meet others from far away
    few = rows if whole else islice(rows, ALONE)
    for chunk in _chunks(pairs_of_rows(few, hands.tokenizer, rules, report)):
        yield arrays_of(chunk, places)
    more = next(rows, None)
    if more is None:
        return
    with counting() as heard:
        heard(ALONE)
        rest = chain([more], rows)
        if hands.processes == 1:
            counted = _counted(rest, heard)
            for chunk in _chunks(pairs_of_rows(counted, hands.tokenizer, rules, report)):
                yield arrays_of(chunk, places)
            return
        with Workers(hands.processes, hands.load, rules, places) as workers:
            for answer in _asked(_chunks(rest), workers):
                report.add(answer.report)
                heard(answer.report.read)
                yield answer.arrays


def _counted(rows: Iterable[Row], heard: Heard) -> Iterator[Row]:
    for row in rows:
        heard(1)
        yield row


def _chunks(items: Iterable[Any]) -> Iterator[Sequence[Any]]:
    """So many at a time. Those that come before an error come before it."""
    chunk: list[Any] = []
    try:
        for item in items:
            chunk.append(item)
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []
    except DPOError:
        yield chunk
        raise
    yield chunk


def _asked(chunks: Iterator[Sequence[Row]], workers: Workers) -> Iterator[Answer]:
    """Answers in the order of the chunks; what cannot be read is raised behind all before it."""
    waiting: deque[Future[Answer]] = deque()
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
            if len(waiting) == AHEAD * workers.count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)
    if unreadable is not None:
        raise unreadable
