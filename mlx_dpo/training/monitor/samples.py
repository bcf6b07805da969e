"""Sampled answers: their length, repetition and KL divergence from the base model.

Metrics of pairs judge given texts. A policy can rank them well while its own answers repeat
themselves or run to the length limit; only its own answers show that.
"""

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.adapters.attach import disable_adapters, get_fine_tune_type
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.generation.batch import GeneratedTokens, generate_tokens, is_batching_exact
from mlx_dpo.generation.repetition import repetition_rate
from mlx_dpo.io.arrays import scalar
from mlx_dpo.losses.metrics import EVAL_PREFIX
from mlx_dpo.scoring.logps import token_logps
from mlx_dpo.training.monitor.metrics import Row
from mlx_dpo.types import TokenizedPair

SAMPLE_TOKENS = 64  # longest sampled answer: enough to see repetition, and little time
MIN_ROOM = 16  # tokens that a prompt must leave in the model's context
# Names in metrics.jsonl, as TRL's online trainers have them (`completions/…`, `kl`).
LENGTH = "completions/mean_length"
CLIPPED = "completions/clipped_ratio"
REPETITION = "completions/repetition"
KL = "completions/kl"

MAX_REPETITION = 0.25  # share of repeated 4-grams; sound answers of any model have a few percent
MORE_REPETITION = 0.15  # above the base model, which may repeat itself as well
MAX_KL = 1.0  # nats per token; about the entropy of a chat model per token
MIN_LENGTH_SHARE = 0.1  # of the base model's length; below it answers are empty
MORE_CLIPPED = 0.5  # share of answers at the length limit, above the base model's share


# A context in which a policy is the model that training started from.
BaseMode = Callable[[nn.Module], AbstractContextManager[None]]


def base_name(name: str) -> str:
    """Return the name of a metric of the base model's answers."""
    return name.replace("completions/", "completions/base_")


@dataclass(frozen=True)
class SampleMetrics:
    """Means over sampled answers."""

    length: float  # tokens, without the stop token
    clipped: float  # share of answers that were cut at the length limit
    repetition: float  # share of repeated 4-grams
    kl: float | None = None  # estimate of KL(policy || base), in nats per token

    def to_row(self) -> dict[str, float]:
        """Return the metrics by their name in metrics.jsonl."""
        values = {LENGTH: self.length, CLIPPED: self.clipped, REPETITION: self.repetition}
        if self.kl is not None:
            values[KL] = self.kl
        return values


def measure_answers(answers: Sequence[GeneratedTokens], kl: float | None = None) -> SampleMetrics:
    """Return the metrics of at least one answer; `kl` is measured by `estimate_kl`."""
    return SampleMetrics(
        length=fmean(len(answer.tokens) for answer in answers),
        clipped=fmean(answer.stop_token is None for answer in answers),
        repetition=fmean(repetition_rate(answer.tokens) for answer in answers),
        kl=kl,
    )


def estimate_kl(
    policy: nn.Module,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[GeneratedTokens],
    base_mode: BaseMode = disable_adapters,
) -> float | None:
    """Estimate KL(policy || base) per token, in nats, from answers of the policy.

    The estimate is the mean log-ratio of the sampled tokens. It is unbiased at temperature 1, and
    its expectation is never negative. The base is what the model is in `base_mode`, by default
    without adapters; after full fine-tuning its weights are gone and the result is None, as it is
    without any tokens.
    """
    if get_fine_tune_type(policy) == "full":
        return None
    total, count = 0.0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        stop = [] if answer.stop_token is None else [answer.stop_token]
        tokens = mx.array([[*prompt, *answer.tokens, *stop]])
        logps = token_logps(policy, tokens)[0, len(prompt) - 1 :]
        with base_mode(policy):
            base_logps = token_logps(policy, tokens)[0, len(prompt) - 1 :]
        total += scalar((logps - base_logps).sum())
        count += logps.size
    return total / count if count else None


class AnswerSampler:
    """Samples a policy's answers to a few held-out prompts, and measures them.

    The samples depend on seed and weights only. Neither MLX's random state nor the weights are
    changed, so a run trains to the same weights with and without samples.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        stop_tokens: AbstractSet[int],
        *,
        max_tokens: int,
        context: int | None,
    ) -> None:
        """Create a sampler of one answer, of at most `max_tokens` tokens, to each prompt."""
        self.base_mode: BaseMode = disable_adapters  # the policy as training started from it
        self.prompts, self._stop_tokens, self._context = prompts, stop_tokens, context
        self.sampling = Sampling(temperature=1.0, max_tokens=max_tokens, seed=0)
        self.answers: list[GeneratedTokens] = []  # of the policy, at the last measurement
        self.base_answers: list[GeneratedTokens] | None = None  # None: not sampled, or no base left
        self._base: dict[str, float] | None = None  # metrics of the base model's answers
        self._is_batched: bool | None = None  # found out once, as it depends on the architecture

    @classmethod
    def for_pairs(
        cls,
        pairs: Sequence[TokenizedPair],
        count: int,
        *,
        stop_tokens: AbstractSet[int],
        context: int | None,
        longest: int = SAMPLE_TOKENS,
    ) -> "AnswerSampler | None":
        """Create a sampler of answers to the first `count` different prompts that leave room.

        The result is None if there are no such prompts.

        Args:
            context: context length of the model in tokens; None if it is unknown.
            longest: largest number of tokens of an answer, if the context leaves room for it.
        """
        prompts: dict[tuple[int, ...], None] = {}
        for pair in pairs:
            if len(prompts) == count:
                break
            if context is None or context - len(pair.prompt) >= MIN_ROOM:
                prompts[pair.prompt] = None
        if not prompts:
            return None
        room = longest if context is None else context - max(map(len, prompts))
        max_tokens = min(longest, room)
        return cls(list(prompts), stop_tokens, max_tokens=max_tokens, context=context)

    def measure(self, policy: nn.Module) -> dict[str, float]:
        """Return the metrics of the policy's and of the base model's answers, for a metrics row."""
        policy.eval()
        if self._base is None:
            self._base = self._measure_base(policy)
        self.answers = answers = self.sample(policy)
        row = measure_answers(answers, self._estimate_kl(policy)).to_row()
        return {EVAL_PREFIX + name: value for name, value in (row | self._base).items()}

    def _estimate_kl(self, policy: nn.Module) -> float | None:
        return estimate_kl(policy, self.prompts, self.answers, self.base_mode)

    def _measure_base(self, policy: nn.Module) -> dict[str, float]:
        """Return the metrics of the base model's answers; none if its weights are gone."""
        if get_fine_tune_type(policy) == "full":
            return {}
        with self.base_mode(policy):
            self.base_answers = self.sample(policy)
        row = measure_answers(self.base_answers).to_row()
        return {base_name(name): value for name, value in row.items()}

    def sample(self, policy: nn.Module) -> list[GeneratedTokens]:
        """Return one answer of `policy`, which is in `eval` mode, to each prompt."""
        if self._is_batched is None:
            self._is_batched = len(self.prompts) > 1 and is_batching_exact(
                policy, self.prompts, context=self._context
            )
        return generate_tokens(
            policy,
            self._stop_tokens,
            self.prompts,
            self.sampling,
            context=self._context,
            is_batched=self._is_batched,
        )


def degenerate_answers(metrics: Row) -> str | None:
    """Return what is wrong with sampled answers, with numbers; None if nothing is.

    Args:
        metrics: metrics by name, without a prefix. Answers of the base may be missing.
    """
    if REPETITION not in metrics:
        return None
    repetition, length, kl = metrics[REPETITION], metrics[LENGTH], metrics.get(KL)
    base_repetition = metrics.get(base_name(REPETITION))
    base_length = metrics.get(base_name(LENGTH))
    faults = []
    if repetition >= max(MAX_REPETITION, (base_repetition or 0.0) + MORE_REPETITION):
        numbers = f"4-gram repetition {repetition:.0%}{_of_base(base_repetition, '.0%')}"
        faults.append(f"answers repeat themselves ({numbers})")
    if base_length and length < MIN_LENGTH_SHARE * base_length:
        faults.append(f"answers are empty ({length:.1f} tokens{_of_base(base_length, '.1f')})")
    if kl is not None and kl >= MAX_KL:
        faults.append(f"answers are far from the base model's (KL {kl:.1f} nats per token)")
    return ", and ".join(faults) or None


def find_collapse(health: Row, base: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a policy's answers, with numbers; None if nothing is.

    Args:
        health: metrics of the policy's answers by name, without a prefix.
        base: the same of the model that training started from; empty if it was not measured.
    """
    of_base = {base_name(name): base[name] for name in (LENGTH, REPETITION) if name in base}
    faults = [fault] if (fault := degenerate_answers({**health, **of_base})) else []
    clipped, before = health[CLIPPED], base.get(CLIPPED)
    if before is not None and clipped >= before + MORE_CLIPPED:
        faults.append(f"answers run to the length limit ({clipped:.0%}, base model {before:.0%})")
    return ", and ".join(faults) or None


def _of_base(value: float | None, form: str) -> str:
    return "" if value is None else f", base model {value:{form}}"
