"""Drift on held-out prompts: KL on the policy's own answers, their form, and perplexity."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_dpo.adapters.switch import AdapterState
from mlx_dpo.evaluation.drift.kl import AnswerKL, mean_per_answer, mean_per_token, measure_kl
from mlx_dpo.evaluation.measurements.perplexity import STATES, safe_exp
from mlx_dpo.generation.batch import GeneratedTokens
from mlx_dpo.generation.context import context_length
from mlx_dpo.phases import phase
from mlx_dpo.saved_runs.open import SwitchableModel
from mlx_dpo.scoring.sequence_logps import ScoredSequence, sequence_logps
from mlx_dpo.training.monitor.samples import (
    KL,
    AnswerSampler,
    SampleMetrics,
    find_collapse,
    measure_answers,
)
from mlx_dpo.types import TokenizedPair


@dataclass(frozen=True)
class OwnAnswers:
    """Answers of base and policy to held-out prompts, sampled at temperature 1."""

    kls: Sequence[AnswerKL]  # of the policy's answers
    metrics: Mapping[AdapterState, SampleMetrics]
    max_tokens: int

    @property
    def fault(self) -> str | None:
        """What is wrong with the policy's answers, with numbers; None if nothing is."""
        before, after = (self.metrics[state].to_row() for state in STATES)
        exact = mean_per_token([kl.exact for kl in self.kls], [kl.tokens for kl in self.kls])
        return find_collapse({**after, KL: exact.mean}, before)

    def kl_to_dict(self) -> dict[str, Any]:
        """Return both estimates of KL(policy || base), in nats per token and per answer."""
        tokens = [kl.tokens for kl in self.kls]
        values = {
            "exact": [kl.exact for kl in self.kls],
            "sampled": [kl.sampled for kl in self.kls],
        }
        estimates = {
            name: {
                "per_token": mean_per_token(own, tokens).to_dict(),
                "per_answer": mean_per_answer(own).to_dict(),
            }
            for name, own in values.items()
        }
        return {"answers": len(self.kls), "tokens": sum(tokens), **estimates}

    def form_to_dict(self, state: AdapterState) -> dict[str, float]:
        """Return mean length, share of cut answers and repetition of the answers in `state`."""
        metrics = self.metrics[state]
        return {
            "mean_length": metrics.length,
            "clipped_ratio": metrics.clipped,
            "repetition": metrics.repetition,
        }


def measure_own_answers(
    model: SwitchableModel, pairs: Sequence[TokenizedPair], *, count: int, max_tokens: int
) -> OwnAnswers | None:
    """Sample answers of base and policy to the first `count` different prompts of `pairs`.

    The result is None if no prompt leaves room for an answer.

    Args:
        model: the model.
        pairs: held-out pairs.
        count: number of prompts.
        max_tokens: largest number of tokens of an answer.
    """
    base = model.base
    sampler = AnswerSampler.for_pairs(
        pairs,
        count,
        stop_tokens=base.tokenizer.eos_token_ids,
        context=context_length(base.config),
        longest=max_tokens,
    )
    if sampler is None:
        return None
    answers: dict[AdapterState, list[GeneratedTokens]] = {}
    for state in STATES:
        with model.switch.activated(state):
            answers[state] = sampler.sample(base.model)
    kls = measure_kl(base.model, model.switch, sampler.prompts, answers["aligned"])
    metrics = {state: measure_answers(answers[state]) for state in STATES}
    return OwnAnswers(kls, metrics, sampler.sampling.max_tokens)


@dataclass(frozen=True)
class ChosenPerplexity:
    """Perplexity per token of base and policy on the chosen completions of held-out pairs."""

    completions: int
    tokens: int
    perplexities: Mapping[AdapterState, float]


def measure_chosen_perplexity(
    model: SwitchableModel, pairs: Sequence[TokenizedPair]
) -> ChosenPerplexity | None:
    """Return exp(-(1/N) sum log p) over the N tokens of all different chosen completions.

    Of labelled completions (KTO), the desirable ones count; of conversations (instruction tuning),
    the turns of the assistant. The result is None without any.
    """
    completions = {
        (pair.prompt, pair.chosen, pair.gaps): pair
        for pair in pairs
        if pair.desirable is not False and pair.chosen and pair.prompt
    }
    if not completions:
        return None
    sequences = [_to_sequence(pair) for pair in completions.values()]
    tokens = sum(pair.num_scored for pair in completions.values())
    perplexities = {}
    for state in STATES:
        with (
            model.switch.activated(state),
            phase(f"Computing perplexity ({state})", len(sequences), unit="completions") as advance,
        ):
            logps = sequence_logps(model.base.model, sequences, progress=advance)
        perplexities[state] = safe_exp(-math.fsum(logps) / tokens)
    return ChosenPerplexity(len(completions), tokens, perplexities)


def _to_sequence(pair: TokenizedPair) -> ScoredSequence:
    """Return the prompt with the chosen completion, of which the completion is scored."""
    begin = len(pair.prompt)
    gaps = [(begin + start, begin + end) for start, end in pair.gaps]
    return ScoredSequence((*pair.prompt, *pair.chosen), begin, gaps)
