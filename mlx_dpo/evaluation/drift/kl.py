"""The KL divergence of a policy from the model it started from, on its own answers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_dpo.adapters.switch import AdapterSwitch
from mlx_dpo.generation.batch import GeneratedTokens
from mlx_dpo.io.arrays import scalar
from mlx_dpo.phases import phase

CHUNK = 64  # positions whose float32 distributions over the vocabulary are in memory at once


class AnswerKL(NamedTuple):
    """Both estimates of KL(policy || base) from one sampled answer, in nats."""

    exact: float  # sum over positions of the KL divergence of the next-token distributions
    sampled: float  # log-ratio of the answer
    tokens: int  # of the answer, with its stop token


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its standard error, which is None for a single answer."""

    mean: float
    stderr: float | None

    def to_dict(self) -> dict[str, float | None]:
        """Return the estimate as values for JSON."""
        return {"mean": self.mean, "stderr": self.stderr}


def kl_of_logits(policy: mx.array, base: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Return the KL divergence and the log-ratio of the target at each position. (T,) float32 each

    A token that the policy excludes (logit -inf) adds nothing to the divergence. The divergence is
    never negative; where rounding in float32 makes it so, it is 0.

    Args:
        policy: logits of the policy. (T, V)
        base: logits of the base at the same positions. (T, V)
        targets: token ids that follow. (T,)
    """
    log_p = _log_softmax(policy)
    log_ratios = log_p - _log_softmax(base)
    p = mx.exp(log_p)
    divergences = mx.where(p > 0, p * log_ratios, 0.0).sum(axis=-1)
    of_targets = mx.take_along_axis(log_ratios, targets[:, None], axis=-1).squeeze(-1)
    return mx.maximum(divergences, 0.0), of_targets


def _log_softmax(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def measure_kl(
    model: Any,
    switch: AdapterSwitch,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[GeneratedTokens],
) -> list[AnswerKL]:
    """Estimate KL(policy || base) from each answer that the policy sampled at temperature 1.

    With answers y ~ π(· | x), both estimates have the expectation KL(π(· | x) || π_base(· | x)), of
    answers up to the token limit:

        sampled  log π(y | x) / π_base(y | x)
        exact    sum_t KL(π(· | x, y_<t) || π_base(· | x, y_<t))

    `exact` sums over the vocabulary instead of drawing one token, the Rao-Blackwellized estimator,
    whose variance is never larger, and which is never negative. Source: Amini et al. 2025,
    arXiv:2504.10637.

    `estimate_kl` of the monitor is the mean of `sampled` per token. The base of `switch` is the
    model that training started from, with its start adapter, also after full fine-tuning.

    Args:
        model: the model of `switch`, in `eval` mode.
        switch: switch between the states `aligned` (the policy) and `base`.
        prompts: token ids.
        answers: one answer of the policy per prompt.
    """
    results = []
    with phase("Computing KL divergence", len(answers), unit="answers") as advance:
        for prompt, answer in zip(prompts, answers, strict=True):
            stop = [] if answer.stop_token is None else [answer.stop_token]
            results.append(_answer_kl(model, switch, prompt, [*answer.tokens, *stop]))
            advance(1)
    return results


def _answer_kl(
    model: Any, switch: AdapterSwitch, prompt: Sequence[int], answer: Sequence[int]
) -> AnswerKL:
    if not answer:
        return AnswerKL(0.0, 0.0, 0)
    tokens = mx.array([[*prompt, *answer]])
    logits = []
    for state in ("aligned", "base"):
        with switch.activated(state):
            logits.append(model(tokens[:, :-1])[0, len(prompt) - 1 :])
            mx.eval(logits[-1])
    exact = sampled = 0.0
    for start in range(0, len(answer), CHUNK):
        chunk = slice(start, start + CHUNK)
        policy, base = (values[chunk] for values in logits)
        divergences, log_ratios = kl_of_logits(policy, base, mx.array(list(answer[chunk])))
        exact += scalar(divergences.sum())
        sampled += scalar(log_ratios.sum())
    return AnswerKL(exact, sampled, len(answer))


def mean_per_answer(values: Sequence[float]) -> Estimate:
    """Return the mean over answers with its standard error, s / sqrt(n)."""
    array = np.asarray(values, float)
    stderr = None if array.size < 2 else float(array.std(ddof=1) / math.sqrt(array.size))
    return Estimate(float(array.mean()), stderr)


def mean_per_token(values: Sequence[float], tokens: Sequence[int]) -> Estimate:
    """Return the ratio of sums R = sum_i v_i / sum_i t_i with its standard error.

    Answers are independent, their tokens are not. The standard error is that of a ratio estimator:

        sqrt(n / (n - 1) sum_i (v_i - R t_i)²) / sum_i t_i

    Source: Cochran 1977, Sampling Techniques, Eq. 2.46, without the correction for a finite
    population.
    """
    array, counts = np.asarray(values, float), np.asarray(tokens, float)
    total, size = counts.sum(), array.size
    ratio = float(array.sum() / total)
    if size < 2:
        return Estimate(ratio, None)
    squares = float(np.square(array - ratio * counts).sum())
    return Estimate(ratio, math.sqrt(size / (size - 1) * squares) / float(total))
