"""Compute the log-probs of whole datasets without gradients.

They are needed for the reference, for evaluations and for WPO's weights.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dpo.config.training import PassLimit
from mlx_dpo.data.batches.micro_batches import micro_batches
from mlx_dpo.data.batches.order import prompt_numbers
from mlx_dpo.data.batches.token_counts import CountTokens, padded_row_tokens, shares_prefixes
from mlx_dpo.distributed.ranks import SINGLE_PROCESS, Ranks
from mlx_dpo.errors import TrainingError
from mlx_dpo.parallel.second_process import SecondProcess
from mlx_dpo.scoring.scorers import Scorer, fast_inference, plain_scorer
from mlx_dpo.types import PairLogps, TokenizedPair

SORTED_PAIRS = 1024  # pairs in memory at once, where passes are cut by tokens rather than lengths
# With fewer passes, starting a second process costs about as much as it saves.
MIN_PARALLEL_PASSES = 6


class Processes(NamedTuple):
    """The processes that compute passes without gradients.

    Attributes:
        at_once: 2 computes every other pass in a second process, if the passes are many.
        ranks: ranks that share the passes; with several, `at_once` does not count.
    """

    at_once: int = 1
    ranks: Ranks = SINGLE_PROCESS


DEFAULT_PROCESSES = Processes()


class DatasetScorer(Protocol):
    """Function that computes the log-probs of a dataset: `score_pairs` with its options set."""

    def __call__(
        self,
        model: nn.Module,
        pairs: Sequence[TokenizedPair],
        *,
        progress: Callable[[int], None] = ...,
    ) -> PairLogps:
        """Return the summed log-probs of all completions under `model`. (len(pairs),) each

        `progress` is called after each forward pass with the number of pairs in it.
        """


def score_pairs(
    model: nn.Module,
    pairs: Sequence[TokenizedPair],
    *,
    limit: PassLimit,
    scorer: Scorer = plain_scorer,
    cost: CountTokens = padded_row_tokens,
    processes: Processes = DEFAULT_PROCESSES,
    progress: Callable[[int], None] = lambda scored: None,
) -> PairLogps:
    """Return the log-probs of all pairs under `model`, in the order of `pairs`. (len(pairs),) each

    Pairs of similar length, or with common beginnings, go through the model together. The model is
    left in evaluation mode.

    Args:
        limit: maximum number of pairs or tokens per forward pass.
        scorer: function that computes the log-probs of the pairs of one forward pass.
        cost: function that counts the tokens of a forward pass with `scorer`.
        processes: processes that compute the passes; all ranks must call with the same pairs.
        progress: called after each forward pass with the number of pairs in it.

    Raises:
        TrainingError: a log-probability is not a finite number. All ranks raise it.
    """
    model.eval()
    chosen = np.zeros(len(pairs), np.float32)
    rejected = np.zeros(len(pairs), np.float32)

    def build(indices: Sequence[int]) -> PairLogps:
        with fast_inference(model):
            return scorer(model, [pairs[i] for i in indices])

    groups = list(_passes(pairs, limit, cost))
    is_parallel = processes.at_once > 1 and len(groups) >= MIN_PARALLEL_PASSES
    if not processes.ranks.is_alone:
        computed = _computed_by_ranks(build, groups, processes.ranks, progress)
        progress = _no_progress  # counted where the passes are computed
    elif is_parallel:
        computed = _computed_by_two(build, groups)
    else:
        computed = _computed_in_turn(build, groups)
    with closing(computed):  # an error keeps this frame, and with it a second process
        for indices, logps in zip(groups, computed, strict=True):
            chosen[indices], rejected[indices] = np.array(logps.chosen), np.array(logps.rejected)
            _check_finite(indices, chosen + rejected, pairs)
            progress(len(indices))
    return PairLogps(mx.array(chosen), mx.array(rejected))


def _passes(
    pairs: Sequence[TokenizedPair], limit: PassLimit, cost: CountTokens
) -> Iterator[list[int]]:
    """Yield the indices of the pairs of each forward pass."""
    if not shares_prefixes(cost):
        yield from micro_batches(range(len(pairs)), pairs, limit, cost=cost)
        return
    by_prompt = np.argsort(prompt_numbers(pairs), kind="stable").tolist()
    for start in range(0, len(pairs), SORTED_PAIRS):
        yield from micro_batches(by_prompt[start : start + SORTED_PAIRS], pairs, limit, cost=cost)


def _computed_in_turn(
    build: Callable[[Sequence[int]], PairLogps], groups: Sequence[Sequence[int]]
) -> Generator[PairLogps, None, None]:
    """Compute one graph after the other, and yield each when its values are there.

    The next graph is built while the last one is computed, but its computation begins only
    afterwards: together they would need the memory of two passes.
    """
    waiting: PairLogps | None = None
    for group in groups:
        graph = build(group)
        if waiting is not None:
            mx.eval(waiting)
        mx.async_eval(graph)
        if waiting is not None:
            yield waiting
        waiting = graph
    if waiting is not None:
        mx.eval(waiting)
        yield waiting


def _computed_by_two(
    build: Callable[[Sequence[int]], PairLogps], groups: Sequence[Sequence[int]]
) -> Generator[PairLogps, None, None]:
    """Compute every other graph in a second process; yield all in the order of `groups`."""

    def compute(group: Sequence[int]) -> PairLogps:
        logps = build(group)
        mx.eval(logps)
        return logps

    def answer(rest: Sequence[Sequence[int]]) -> Iterator[PairLogps]:
        return map(compute, rest)

    with SecondProcess(answer) as second, second.sharing_cores():
        yield compute(groups[0])  # what all passes share is computed here, before the fork
        second.ask(groups[2::2])
        for number, group in enumerate(groups[1:], start=1):
            yield second.receive() if number % 2 == 0 else compute(group)


def _computed_by_ranks(
    build: Callable[[Sequence[int]], PairLogps],
    groups: Sequence[Sequence[int]],
    ranks: Ranks,
    progress: Callable[[int], None],
) -> Generator[PairLogps, None, None]:
    """Compute the graphs of this rank; yield all in the order of `groups` when all are gathered."""
    rounds = ranks.rounds(len(groups))
    numbers = [round_[ranks.rank] for round_ in rounds]
    if ranks.in_lockstep:
        own = [groups[-1 if number is None else number] for number in numbers]
    else:
        own = [groups[number] for number in numbers if number is not None]
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    for round_, logps in zip(rounds, _computed_in_turn(build, own), strict=False):
        parts.append((np.array(logps.chosen), np.array(logps.rejected)))
        ranks.note_progress()
        progress(sum(len(groups[number]) for number in round_ if number is not None))
    named = {
        str(number): np.stack(part)
        for number, part in zip(numbers, parts, strict=False)
        if number is not None
    }
    gathered: dict[str, np.ndarray] = {}
    for of_rank in ranks.all_gather_arrays("log-probs", named):
        gathered |= of_rank
    for round_ in rounds[len(parts) :]:
        progress(sum(len(groups[number]) for number in round_ if number is not None))
    for number in range(len(groups)):
        chosen, rejected = gathered[str(number)]
        yield PairLogps(mx.array(chosen), mx.array(rejected))


def _no_progress(scored: int) -> None:
    """Do nothing."""


def on_policy_weights(
    model: nn.Module, pairs: Sequence[TokenizedPair], *, score: DatasetScorer
) -> mx.array:
    """Return WPO's weight of each pair, by its likelihood under the policy `model`. (len(pairs),)

    A pair whose completions are sampled from the policy has a weight of about 1.

    Source: WPO, Zhou et al. 2024, arXiv:2406.11827, Eq. 2 with sampled alignment, as in TRL.

    Args:
        score: function that returns the mean WPO log-weight per token of each completion.
    """
    chosen, rejected = score(model, pairs)
    return mx.exp(chosen + rejected)


def _check_finite(
    indices: Sequence[int], logps: np.ndarray, pairs: Sequence[TokenizedPair]
) -> None:
    """Raise `TrainingError` if any of `logps[indices]` is infinite or NaN."""
    for index in indices:
        if not np.isfinite(logps[index]):
            raise TrainingError(
                f"{pairs[index].location}: a completion has log-probability {logps[index]}; "
                "the model's output is not finite; try --dtype float32"
            )
