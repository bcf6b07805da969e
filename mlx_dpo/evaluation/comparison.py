"""Answers side by side, each bit with how much more the policy likes it than its reference."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dpo.policy.batched import Completion
from mlx_dpo.policy.generation import TextStream
from mlx_dpo.policy.logps import token_logps
from mlx_dpo.preferences.prompts import Prompt

GRAM = 4  # tokens in a row that count as repeated where they were said before
REFUSAL = re.compile(
    r"\b(i('m| am) (sorry|afraid),? (but |that )*(i|this|that)\b"
    r"|i (can('t|not| not)|won't|will not|must decline)"
    r"|i('m| am) (unable|not able)|(as|i('m| am)) an? (ai|language model))\b"
)
OPENING = 80  # letters in which a refusal is looked for


@dataclass(frozen=True, slots=True)
class Bit:
    """A bit of an answer: a token, or the tokens of a character that takes several."""

    text: str
    log_ratio: float  # log policy - log reference, in nats


@dataclass(frozen=True, slots=True)
class Shaded:
    """An answer by its bits."""

    bits: tuple[Bit, ...]
    end: float | None  # log-ratio of ending here; None where the answer was cut
    tokens: tuple[int, ...]

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(bit.text for bit in self.bits)

    @property
    def log_ratio(self) -> float:
        """Of the whole answer, in nats."""
        return sum(bit.log_ratio for bit in self.bits) + (self.end or 0.0)


@dataclass(frozen=True)
class Column:
    """What one policy said to every prompt."""

    name: str
    answers: tuple[Shaded, ...]

    def figures(self) -> dict[str, str]:
        """Counts and means for a person."""
        texts = [answer.text for answer in self.answers]
        lengths = [len(answer.tokens) for answer in self.answers]
        return {
            "tokens an answer": f"{fmean(lengths):.1f}",
            "cut before their end": str(sum(answer.end is None for answer in self.answers)),
            f"{GRAM} tokens said before": f"{fmean(map(repetition, self.answers)):.1%}",
            "refusals": str(sum(map(refuses, texts))),
            "log-ratio, nats an answer": f"{fmean(a.log_ratio for a in self.answers):+.2f}",
        }


@dataclass(frozen=True)
class Comparison:
    """Prompts, and a column of answers for each policy."""

    prompts: tuple[Prompt, ...]
    columns: tuple[Column, ...]
    notes: tuple[str, ...]


def completion_token_logps(
    model: Any, prompt: Sequence[int], completion: Sequence[int]
) -> list[float]:
    """log p of each token of a completion. (len(completion),)"""
    if not completion:
        return []
    logps = token_logps(model, mx.array([[*prompt, *completion]]))
    return [float(logp) for logp in np.array(logps[0, len(prompt) - 1 :])]


def shaded(
    tokenizer: Any, said: Completion, policy: Sequence[float], reference: Sequence[float]
) -> Shaded:
    """The text of a completion with the log-ratio of each bit; `policy` and `reference` are log p
    of its tokens, that of its end among them where it has one.
    """
    ratios = [p - r for p, r in zip(policy, reference, strict=True)]
    stream, bits, waiting = TextStream(tokenizer), [], 0.0
    for token, ratio in zip(said.tokens, ratios, strict=False):
        waiting += ratio
        if text := stream.add(token):
            bits.append(Bit(text, waiting))
            waiting = 0.0
    if (text := stream.finish()) or waiting:
        bits.append(Bit(text, waiting))
    end = None if said.end is None else ratios[-1]
    return Shaded(tuple(bits), end, tuple(said.tokens))


def repetition(answer: Shaded) -> float:
    """Share of the runs of four tokens that stood in the same answer before.

    Source: Welleck et al. 2019, arXiv:1908.04319, section 6.1, seq-rep-4.
    """
    tokens = answer.tokens
    runs = [tokens[i : i + GRAM] for i in range(len(tokens) - GRAM + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def refuses(text: str) -> bool:
    """Whether an answer begins as refusals in English do."""
    return REFUSAL.search(text[:OPENING].lower().replace("’", "'")) is not None
