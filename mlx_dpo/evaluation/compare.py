"""Answers side by side, each bit with how much more the policy likes it than its reference."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dpo.adapters.switch import AdapterState
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.inspect.text_anomalies import find_refusal
from mlx_dpo.data.prompts import Prompt, add_system_prompt, read_prompts
from mlx_dpo.errors import ConfigError
from mlx_dpo.generation.generate import (
    GeneratedTokens,
    StreamingDecoder,
    context_length,
    encode_prompt,
    encode_text,
    generate_tokens,
)
from mlx_dpo.saved_runs.evaluate import held_out_prompts
from mlx_dpo.saved_runs.open import OpenRun, SwitchableModel, open_switchable
from mlx_dpo.scoring.logps import token_logps

NGRAM = 4  # tokens in a row that count as repeated where they were said before


@dataclass(frozen=True, slots=True)
class TextSpan:
    """A bit of an answer: a token, or the tokens of a character that takes several."""

    text: str
    log_ratio: float  # log policy - log reference, in nats


@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """An answer by its bits."""

    bits: tuple[TextSpan, ...]
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
    answers: tuple[ScoredAnswer, ...]

    def figures(self) -> dict[str, str]:
        """Counts and means for a person."""
        texts = [answer.text for answer in self.answers]
        lengths = [len(answer.tokens) for answer in self.answers]
        return {
            "tokens an answer": f"{fmean(lengths):.1f}",
            "cut before their end": str(sum(answer.end is None for answer in self.answers)),
            f"{NGRAM} tokens said before": f"{fmean(map(repetition_rate, self.answers)):.1%}",
            "refusals": str(sum(find_refusal(text) is not None for text in texts)),
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


def score_spans(
    tokenizer: Any, said: GeneratedTokens, policy: Sequence[float], reference: Sequence[float]
) -> ScoredAnswer:
    """The text of a completion with the log-ratio of each bit; `policy` and `reference` are log p
    of its tokens, that of its end among them where it has one.
    """
    ratios = [p - r for p, r in zip(policy, reference, strict=True)]
    stream, bits, waiting = StreamingDecoder(tokenizer), [], 0.0
    for token, ratio in zip(said.tokens, ratios, strict=False):
        waiting += ratio
        if text := stream.add(token):
            bits.append(TextSpan(text, waiting))
            waiting = 0.0
    if (text := stream.finish()) or waiting:
        bits.append(TextSpan(text, waiting))
    end = None if said.end is None else ratios[-1]
    return ScoredAnswer(tuple(bits), end, tuple(said.tokens))


def repetition_rate(answer: ScoredAnswer) -> float:
    """Share of the runs of four tokens that stood in the same answer before.

    Source: Welleck et al. 2019, arXiv:1908.04319, section 6.1, seq-rep-4.
    """
    tokens = answer.tokens
    runs = [tokens[i : i + NGRAM] for i in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


TokenIds = list[int]


def compare_runs(
    runs: Sequence[str], prompts: str | None, sampling: Sampling, *, limit: int | None = None
) -> Comparison:
    """Base and aligned of a run; of several runs the aligned ones, one in memory at a time.

    Without a file of `prompts`, those that the first run held out; `limit` takes the first ones.

    Raises:
        ConfigError: a prompt leaves no room for an answer, or there are none.
        RunError, ModelError, DataError: a run, its model or the prompts are at fault.
    """
    asked, columns, notes = _compare_run(runs[0], prompts, sampling, limit, alone=len(runs) == 1)
    for name in runs[1:]:
        _, more, also = _compare_run(name, asked, sampling, None, alone=False)
        columns, notes = columns + more, notes + also
    return Comparison(tuple(asked), tuple(columns), tuple(dict.fromkeys(notes)))


def _compare_run(
    name: str,
    prompts: str | list[Prompt] | None,
    sampling: Sampling,
    limit: int | None,
    *,
    alone: bool,
) -> tuple[list[Prompt], list[Column], list[str]]:
    """The prompts, the columns of one run and what there is to say of it; it is freed here."""
    opened = open_switchable(name)
    run = opened.run
    assert run is not None
    if prompts is None:
        prompts = held_out_prompts(run, opened.base)
    elif isinstance(prompts, str):
        prompts = read_prompts(prompts)
    asked = prompts[:limit]
    notes = [*_limit_note(len(prompts), limit), *_notes(name, opened, run)]
    sides: tuple[AdapterState, ...] = ("base", "aligned") if alone else ("aligned",)
    told = add_system_prompt(asked, run.config.system)
    columns = [
        Column(side if alone else name, answers)
        for side, answers in _score_answers(opened, run, told, sides, sampling)
    ]
    return asked, columns, notes


def _limit_note(found: int, limit: int | None) -> Iterator[str]:
    if limit is not None and limit < found:
        yield f"the first {limit} of {found} prompts"


def _notes(name: str, opened: SwitchableModel, run: OpenRun) -> Iterator[str]:
    yield from opened.notes
    if run.config.reference_model is not None:
        yield (
            f"{name} was trained against {run.config.reference_model}; here it is held against "
            "the model that it started from"
        )


def _score_answers(
    opened: SwitchableModel,
    run: OpenRun,
    prompts: Sequence[Prompt],
    sides: Sequence[AdapterState],
    sampling: Sampling,
) -> Iterator[tuple[AdapterState, tuple[ScoredAnswer, ...]]]:
    """What each of the sides says, shaded by both."""
    base = opened.base
    rows = [_prompt_ids(opened, run, prompt) for prompt in prompts]
    _check_context(rows, prompts, context_length(base.config), sampling.max_tokens)
    for side in sides:
        with opened.sides.activated(side):
            said = generate_tokens(base.model, base.tokenizer.eos_token_ids, rows, sampling)
        aligned, reference = (
            _completion_logps(opened, which, rows, said) for which in ("aligned", "base")
        )
        whole = zip(said, aligned, reference, strict=True)
        yield side, tuple(score_spans(base.tokenizer, *each) for each in whole)


def _completion_logps(
    opened: SwitchableModel,
    side: AdapterState,
    rows: Sequence[TokenIds],
    said: Sequence[GeneratedTokens],
) -> list[list[float]]:
    """log p of the tokens of each completion, and of its end where it has one."""
    with opened.sides.activated(side):
        return [
            completion_token_logps(
                opened.base.model, row, [*one.tokens, *([] if one.end is None else [one.end])]
            )
            for row, one in zip(rows, said, strict=True)
        ]


def _prompt_ids(opened: SwitchableModel, run: OpenRun, prompt: Prompt) -> TokenIds:
    tokenizer = opened.base.tokenizer
    if run.trained_on_text or not tokenizer.has_chat_template:
        said = "\n".join(str(m["content"]) for m in prompt.messages)
        return encode_text(tokenizer, said if prompt.text is None else prompt.text)
    return encode_prompt(tokenizer, prompt.messages, thinking=run.config.thinking)


def _check_context(
    rows: Sequence[TokenIds], prompts: Sequence[Prompt], context: int | None, room: int
) -> None:
    for row, prompt in zip(rows, prompts, strict=True):
        if context is not None and len(row) + room > context:
            raise ConfigError(
                f"{prompt.location}: {len(row)} tokens leave no room for an answer of {room} (the "
                f"model's context is {context}); use a smaller --max-tokens, or leave it out"
            )
