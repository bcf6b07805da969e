"""Prompts to completions, many at once where that is exact: token ids in, token ids out."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from contextlib import closing
from typing import Any, NamedTuple

from mlx_dpo.policy.generation import make_processors, make_sampler, stream_tokens
from mlx_dpo.policy.sampling import Sampling

PROBE_PROMPT, PROBE_TOKENS = 64, 16


class Completion(NamedTuple):
    """What a model said to one prompt."""

    tokens: list[int]  # without the one that ended it
    end: int | None  # the token that ended it; None where it was cut


def complete(
    model: Any, stops: AbstractSet[int], rows: Sequence[Sequence[int]], sampling: Sampling
) -> list[Completion]:
    """A completion for each row of prompt tokens, in order.

    With `temperature` 0 these are the ones that each would get alone. They are computed together
    where the architecture's batched cache is exact, else one after another.
    """
    batched = len(rows) > 1 and batches_exactly(model, rows)
    return (_together if batched else _one_by_one)(model, stops, rows, sampling)


def batches_exactly(model: Any, rows: Sequence[Sequence[int]]) -> bool:
    """Whether this architecture's batched cache gives the tokens that single prompts give.

    Tried on the shortest and the longest prompt: padding is where such caches go wrong.
    """
    pair = [min(rows, key=len)[-PROBE_PROMPT:], max(rows, key=len)[-PROBE_PROMPT:]]
    pair[0] = pair[0][: max(1, len(pair[1]) // 2)]
    probe = Sampling(max_tokens=PROBE_TOKENS)
    try:
        together = _together(model, frozenset(), pair, probe)
    except ValueError:  # mlx-lm's word for a cache that cannot be batched, MLX's for shapes
        return False
    return together == _one_by_one(model, frozenset(), pair, probe)


def _together(
    model: Any, stops: AbstractSet[int], rows: Sequence[Sequence[int]], sampling: Sampling
) -> list[Completion]:
    from mlx_lm.generate import BatchGenerator

    generator = BatchGenerator(
        model,
        stop_tokens=[[stop] for stop in stops],
        sampler=make_sampler(sampling),
        logits_processors=make_processors(sampling),
    )
    with closing(generator):
        numbers = generator.insert([list(row) for row in rows], [sampling.max_tokens] * len(rows))
        said = {number: Completion([], None) for number in numbers}
        while responses := generator.next_generated():
            for response in responses:
                if response.finish_reason == "stop":
                    said[response.uid] = said[response.uid]._replace(end=response.token)
                else:
                    said[response.uid].tokens.append(response.token)
    return [said[number] for number in numbers]


def _one_by_one(
    model: Any, stops: AbstractSet[int], rows: Sequence[Sequence[int]], sampling: Sampling
) -> list[Completion]:
    sampler = make_sampler(sampling)
    return [_alone(model, stops, row, sampling, sampler) for row in rows]


def _alone(
    model: Any, stops: AbstractSet[int], row: Sequence[int], sampling: Sampling, sampler: Any
) -> Completion:
    tokens = stream_tokens(
        model,
        row,
        max_tokens=sampling.max_tokens,
        sampler=sampler,
        processors=make_processors(sampling),
    )
    said: list[int] = []
    with closing(tokens):
        for token in tokens:
            if token in stops:
                return Completion(said, token)
            said.append(token)
    return Completion(said, None)
