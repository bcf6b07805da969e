"""Compute exact log-probs and distributions of all answers that a toy model can give.

Everything here is computed from the model's logits in float64, without the package's scorers.
"""

from collections.abc import Sequence
from itertools import product

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from scripts.studies.toy.words import END, Words

ROWS_PER_PASS = 1024
OTHER = "…"  # all answers that are not listed: longer ones, and ones with special tokens


def next_token_logps(model: nn.Module, sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the log-probs of the token after each sequence, in float64. (N, V)

    All sequences must have the same length.
    """
    tokens, parts = np.array(sequences, np.int32), []
    for start in range(0, len(tokens), ROWS_PER_PASS):
        parts.append(_to_logps(model(mx.array(tokens[start : start + ROWS_PER_PASS]))[:, -1]))
    return np.concatenate(parts)


def _to_logps(logits: mx.array) -> np.ndarray:
    return normalize(np.array(logits.astype(mx.float32), np.float64))


def answer_logps(
    model: nn.Module, vocabulary: Words, prompt: str, answers: Sequence[str]
) -> np.ndarray:
    """Return log π(y|x) of each answer, its end included, in nats. (len(answers),)"""
    sums = np.zeros(len(answers))
    ids = [vocabulary.answer_ids(answer) for answer in answers]
    start = vocabulary.prompt_ids(prompt)
    for length in range(max(map(len, ids))):
        longer = [index for index, tokens in enumerate(ids) if len(tokens) > length]
        logps = next_token_logps(model, [start + ids[index][:length] for index in longer])
        for index, row in zip(longer, logps, strict=True):
            sums[index] += row[ids[index][length]]
    return sums


def token_logps(model: nn.Module, vocabulary: Words, prompt: str, answer: str) -> np.ndarray:
    """Return log π of each token of an answer, its end included, in nats. (tokens,)"""
    start, ids = vocabulary.prompt_ids(prompt), vocabulary.answer_ids(answer)
    logits = model(mx.array([start + ids[:-1]]))[0, len(start) - 1 :]
    logps = normalize(np.array(logits.astype(mx.float32), np.float64))
    return logps[np.arange(len(ids)), ids]


def all_answer_logps(
    model: nn.Module, vocabulary: Words, prompts: Sequence[str], answers: Sequence[str]
) -> np.ndarray:
    """Return log π(y|x) of each answer to each prompt. (prompts, answers)"""
    return np.stack([answer_logps(model, vocabulary, prompt, answers) for prompt in prompts])


class AnswerSpace:
    """All answers of one word up to `longest` words from `words`, and one for all others."""

    def __init__(self, vocabulary: Words, words: Sequence[str], longest: int) -> None:
        self.vocabulary = vocabulary
        self.words = tuple(words)
        self.longest = longest
        self.answers = [
            *(
                " ".join(choice)
                for n in range(1, longest + 1)
                for choice in product(words, repeat=n)
            ),
            OTHER,
        ]
        self.index = {answer: index for index, answer in enumerate(self.answers)}

    def logps(
        self,
        model: nn.Module,
        prompt: str,
        *,
        system: str | None = None,
        temperature: float = 1.0,
    ) -> np.ndarray:
        """Return log π(y|x) of every answer, in the order of `answers`, in nats. They sum to one.

        The last one is the log-prob of giving none of the listed answers.

        Args:
            temperature: sampling temperature of each token; 0 for greedy decoding.
        """
        ids = [self.vocabulary.ids[word] for word in self.words]
        tokens, cache = [self.vocabulary.prompt_ids(prompt, system)], make_prompt_cache(model)
        sums, found = np.zeros(1), []
        for length in range(self.longest + 1):
            logps = _to_logps(model(mx.array(tokens), cache=cache)[:, -1])
            logps = temper(logps, temperature)
            if length:
                found.append(sums + logps[:, END])
            if length < self.longest:
                for layer in cache:  # each prefix continues with each word
                    layer.step = 1  # position; 256 by default, which 1000 rows would not fill
                    layer.keys, layer.values = (
                        mx.repeat(array, len(ids), axis=0) for array in layer.keys_and_values()
                    )
                tokens = [[word] for word in ids] * len(sums)
                sums = (sums[:, None] + logps[:, ids]).ravel()
        listed = np.concatenate(found)
        rest = max(1.0 - np.exp(listed).sum(), 1e-300)
        return np.append(listed, np.log(rest))

    def all_logps(
        self, model: nn.Module, prompts: Sequence[str], *, temperature: float = 1.0
    ) -> np.ndarray:
        """Return log π(y|x) of every answer to every prompt. (prompts, answers)"""
        return np.stack([self.logps(model, prompt, temperature=temperature) for prompt in prompts])

    def temper(self, logps: np.ndarray, temperature: float) -> np.ndarray:
        """Return log-probs of answers whose tokens are sampled at `temperature`. (answers)

        The conditional probabilities of tokens follow from `logps`, the log-probs of the answers at
        temperature 1. Answers that are not listed are left out: they get no probability.
        """
        count = len(self.words)
        sizes = np.cumsum([count**length for length in range(1, self.longest)])
        ends = [
            part.reshape((count,) * length)
            for length, part in enumerate(np.split(logps[:-1], sizes), start=1)
        ]
        masses = [ends[-1]]  # log-probs of the answers that begin with a prefix, longest first
        for end in reversed(ends[:-1]):
            masses.append(np.logaddexp(end, np.logaddexp.reduce(masses[-1], axis=-1)))
        sums, found = temper(masses[-1], temperature), []
        for end, longer in zip(ends[:-1], reversed(masses[:-1]), strict=True):
            tokens = temper(np.concatenate([end[..., None], longer], axis=-1), temperature)
            found.append((sums + tokens[..., 0]).ravel())
            sums = sums[..., None] + tokens[..., 1:]
        return np.concatenate([*found, sums.ravel(), [-np.inf]])


def kl_divergence(logps: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return KL(π ‖ π_ref) along the last axis, in nats."""
    return (np.exp(logps) * (logps - reference)).sum(axis=-1)


def total_variation(logps: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the total variation distance, half of the L1 distance, along the last axis."""
    return 0.5 * np.abs(np.exp(logps) - np.exp(other)).sum(axis=-1)


def normalize(logps: np.ndarray) -> np.ndarray:
    """Return log-probs of the distribution that is proportional to exp(logps)."""
    shifted = logps - logps.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def temper(logps: np.ndarray, temperature: float) -> np.ndarray:
    """Return the log-probs of tokens sampled at a temperature; 0 for greedy decoding. (..., V)

    p_T(v) ∝ p(v)^(1/T)
    """
    if temperature > 0:
        return normalize(logps / temperature)
    is_most_likely = np.arange(logps.shape[-1]) == logps.argmax(axis=-1, keepdims=True)
    return np.where(is_most_likely, 0.0, -np.inf)


def optimal_policy(reference: np.ndarray, rewards: np.ndarray, beta: float) -> np.ndarray:
    """Return log π* with π*(y|x) ∝ π_ref(y|x) exp(r(x, y) / β).

    Source: Rafailov et al. 2023, arXiv:2305.18290, Eq. 4.
    """
    return normalize(reference + rewards / beta)


def explained_variance(values: np.ndarray, expected: np.ndarray) -> float:
    """Return R² of `values` as a prediction of `expected` up to a constant, of slope one."""
    error = (values - values.mean()) - (expected - expected.mean())
    return float(1.0 - (error**2).sum() / ((expected - expected.mean()) ** 2).sum())


def rank_correlation(
    values: Sequence[float] | np.ndarray, others: Sequence[float] | np.ndarray
) -> float:
    """Return Spearman's rank correlation; equal values get the mean of their ranks."""
    ranks = [_ranks(np.asarray(each, float)) for each in (values, others)]
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    below = (values[:, None] > values).sum(axis=1)
    return below + 0.5 * (values[:, None] == values).sum(axis=1)
