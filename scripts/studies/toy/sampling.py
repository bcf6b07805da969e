"""Enumerate what sampling at temperature 1 gives, with exact probabilities."""

from typing import NamedTuple

import mlx.nn as nn
import numpy as np

from scripts.studies.toy.exact import next_token_logps
from scripts.studies.toy.words import END, SPECIAL, Words


class Samples(NamedTuple):
    """Probability of each answer, and of the answers that are left out."""

    answers: dict[str, float]
    rest: float


def enumerate_samples(
    model: nn.Module, vocabulary: Words, prompt: str, *, longest: int, smallest: float = 1e-6
) -> Samples:
    """Return the answers that sampling at temperature 1 gives, of at most `longest` words.

    An answer that would go on is cut after `longest` words, as `max_tokens` does. Answers that
    begin with something of a probability below `smallest`, and those with special tokens, are left
    out; `rest` is their total probability.
    """
    start = vocabulary.prompt_ids(prompt)
    first = len(SPECIAL)
    prefixes, logps, answers = [()], np.zeros(1), {}
    for length in range(longest + 1):
        ends, going = np.full(len(prefixes), 0.0), np.empty((0, 0))
        if length < longest:
            steps = next_token_logps(model, [[*start, *prefix] for prefix in prefixes])
            ends, going = steps[:, END], logps[:, None] + steps[:, first:]
        for prefix, logp in zip(prefixes, logps + ends, strict=True):
            answers[" ".join(vocabulary.words[word - first] for word in prefix)] = np.exp(logp)
        kept = np.argwhere(going > np.log(smallest))
        prefixes = [(*prefixes[row], int(word) + first) for row, word in kept]
        logps = going[tuple(kept.T)]
        if not prefixes:
            break
    return Samples(answers, max(0.0, 1.0 - sum(answers.values())))
