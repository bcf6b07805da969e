"""Generate answers of base and aligned model to the same prompts, with log-ratios per token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dpo.adapters.switch import AdapterState
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.inspect.refusals import find_refusal
from mlx_dpo.data.prompts import Prompt, add_system_prompt, read_prompts
from mlx_dpo.generation.batch import GeneratedTokens, generate_tokens
from mlx_dpo.generation.context import clip_note, context_length, max_answer_tokens
from mlx_dpo.generation.decode import StreamingDecoder
from mlx_dpo.generation.prompt import encode_prompt, encode_text
from mlx_dpo.generation.repetition import NGRAM, repetition_rate
from mlx_dpo.phases import phase
from mlx_dpo.saved_runs.evaluate import held_out_prompts
from mlx_dpo.saved_runs.open import OpenRun, SwitchableModel, open_switchable
from mlx_dpo.scoring.generation_match import use_generating_function
from mlx_dpo.scoring.logps import token_logps

TokenIds = list[int]


@dataclass(frozen=True, slots=True)
class TextSpan:
    """The text of one token, or of several tokens that form one character, with its log-ratio."""

    text: str
    log_ratio: float  # log π - log π_ref, in nats


@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """An answer, split into text spans with a log-ratio each."""

    spans: tuple[TextSpan, ...]
    end: float | None  # log-ratio of the end token; None if the answer was cut
    tokens: tuple[int, ...]

    @property
    def text(self) -> str:
        """Text of the whole answer."""
        return "".join(span.text for span in self.spans)

    @property
    def log_ratio(self) -> float:
        """Log-ratio of the whole answer with its end token, in nats."""
        return sum(span.log_ratio for span in self.spans) + (self.end or 0.0)


@dataclass(frozen=True)
class PolicyAnswers:
    """The answers of one policy to the prompts of a comparison."""

    name: str
    answers: tuple[ScoredAnswer, ...]

    def summary(self) -> dict[str, str]:
        """Return statistics of the answers (such as mean length) as label and text."""
        texts = [answer.text for answer in self.answers]
        lengths = [len(answer.tokens) for answer in self.answers]
        repetition = fmean(repetition_rate(answer.tokens) for answer in self.answers)
        return {
            "tokens per answer": f"{fmean(lengths):.1f}",
            "cut at the token limit": str(sum(answer.end is None for answer in self.answers)),
            f"{NGRAM}-gram repetition": f"{repetition:.1%}",
            "refusals": str(sum(find_refusal(text) is not None for text in texts)),
            "log-ratio, nats per answer": f"{fmean(a.log_ratio for a in self.answers):+.2f}",
        }


@dataclass(frozen=True)
class Comparison:
    """The prompts of a comparison, and the answers of each policy to them."""

    prompts: tuple[Prompt, ...]
    policies: tuple[PolicyAnswers, ...]
    notes: tuple[str, ...]
    model_notes: tuple[str, ...] = ()  # on how the models were loaded


def completion_token_logps(
    model: Any, prompt: Sequence[int], completion: Sequence[int]
) -> list[float]:
    """Return the log-prob of each token of a completion to a prompt. (len(completion),)"""
    if not completion:
        return []
    logps = token_logps(model, mx.array([[*prompt, *completion]]))
    return [float(logp) for logp in np.array(logps[0, len(prompt) - 1 :])]


def score_spans(
    tokenizer: Any, completion: GeneratedTokens, policy: Sequence[float], reference: Sequence[float]
) -> ScoredAnswer:
    """Return a completion split into text spans, each with its log-ratio.

    Args:
        policy: log-probs of the completion's tokens, and of its end token if there is one.
        reference: log-probs of the same tokens under the reference model.
    """
    ratios = [p - r for p, r in zip(policy, reference, strict=True)]
    stream, spans, pending = StreamingDecoder(tokenizer), [], 0.0
    for token, ratio in zip(completion.tokens, ratios, strict=False):
        pending += ratio
        if text := stream.add(token):
            spans.append(TextSpan(text, pending))
            pending = 0.0
    if (text := stream.finish()) or pending:
        spans.append(TextSpan(text, pending))
    end = None if completion.stop_token is None else ratios[-1]
    return ScoredAnswer(tuple(spans), end, tuple(completion.tokens))


def compare_runs(
    runs: Sequence[str], prompts: str | None, sampling: Sampling, *, limit: int | None = None
) -> Comparison:
    """Compare base and aligned model of one run, or the aligned models of several runs.

    Only one run's model is in memory at a time.

    Args:
        prompts: a file of prompts; None for the held-out prompts of the first run.
        limit: number of prompts to use, from the beginning; None for all.

    Raises:
        ConfigError: a prompt leaves no room for an answer, or there are no prompts.
        RunError, ModelError, DataError: a run, its model or the prompts cannot be read.
    """
    is_only_run = len(runs) == 1
    prompt_list, policies, notes, model_notes = _compare_run(
        runs[0], prompts, sampling, limit, is_only_run=is_only_run
    )
    for name in runs[1:]:
        _, more_policies, more_notes, more_model_notes = _compare_run(
            name, prompt_list, sampling, None, is_only_run=False
        )
        policies, notes = policies + more_policies, notes + more_notes
        model_notes += more_model_notes
    return Comparison(
        tuple(prompt_list),
        tuple(policies),
        tuple(dict.fromkeys(notes)),
        tuple(dict.fromkeys(model_notes)),
    )


def _compare_run(
    name: str,
    prompts: str | list[Prompt] | None,
    sampling: Sampling,
    limit: int | None,
    *,
    is_only_run: bool,
) -> tuple[list[Prompt], list[PolicyAnswers], list[str], tuple[str, ...]]:
    """Return prompts, scored answers of each policy of a run, notes, and notes on the model.

    The base model's answers are included only if the run is the only one. The model is freed on
    return.
    """
    opened = open_switchable(name)
    run = opened.run
    assert run is not None
    if prompts is None:
        prompts = held_out_prompts(run, opened.base)
    elif isinstance(prompts, str):
        prompts = read_prompts(prompts)
    used = prompts[:limit]
    notes = [*_limit_note(len(prompts), limit), *_reference_note(name, run)]
    states: tuple[AdapterState, ...] = ("base", "aligned") if is_only_run else ("aligned",)
    use_generating_function(
        opened.base.model,
        vocab_size=opened.base.vocab_size,
        max_length=run.config.length_limit,
    )
    with_system = add_system_prompt(used, run.config.system)
    rows = [_prompt_ids(opened, run, prompt) for prompt in with_system]
    notes += _check_context(rows, used, context_length(opened.base.config), sampling.max_tokens)
    policies = [
        PolicyAnswers(state if is_only_run else name, answers)
        for state, answers in _score_answers(opened, rows, states, sampling)
    ]
    return used, policies, notes, opened.notes


def _limit_note(count: int, limit: int | None) -> Iterator[str]:
    if limit is not None and limit < count:
        yield f"the first {limit} of {count} prompts"


def _reference_note(name: str, run: OpenRun) -> Iterator[str]:
    if run.config.reference_model is not None:
        yield (
            f"{name} was trained with the reference {run.config.reference_model}; here it is "
            "compared with the model that it started from"
        )


def _score_answers(
    opened: SwitchableModel,
    rows: Sequence[TokenIds],
    states: Sequence[AdapterState],
    sampling: Sampling,
) -> Iterator[tuple[AdapterState, tuple[ScoredAnswer, ...]]]:
    """Generate answers in each adapter state; yield the state and its answers with log-ratios."""
    base = opened.base
    context = context_length(base.config)
    for state in states:
        with opened.switch.activated(state):
            completions = generate_tokens(
                base.model, base.tokenizer.eos_token_ids, rows, sampling, context=context
            )
        with phase("Computing log-ratios"):
            policy = _completion_logps(opened, "aligned", rows, completions)
            reference = _completion_logps(opened, "base", rows, completions)
        scored = zip(completions, policy, reference, strict=True)
        yield state, tuple(score_spans(base.tokenizer, *answer) for answer in scored)


def _completion_logps(
    opened: SwitchableModel,
    state: AdapterState,
    rows: Sequence[TokenIds],
    completions: Sequence[GeneratedTokens],
) -> list[list[float]]:
    """Return the log-probs of each completion's tokens, with the end token if there is one."""
    with opened.switch.activated(state):
        return [
            completion_token_logps(
                opened.base.model,
                row,
                [
                    *completion.tokens,
                    *([] if completion.stop_token is None else [completion.stop_token]),
                ],
            )
            for row, completion in zip(rows, completions, strict=True)
        ]


def _prompt_ids(opened: SwitchableModel, run: OpenRun, prompt: Prompt) -> TokenIds:
    tokenizer = opened.base.tokenizer
    if run.trained_on_text or not tokenizer.has_chat_template:
        joined = "\n".join(str(m["content"]) for m in prompt.messages)
        return encode_text(tokenizer, joined if prompt.text is None else prompt.text)
    return encode_prompt(tokenizer, prompt.messages, thinking=run.config.thinking)


def _check_context(
    rows: Sequence[TokenIds], prompts: Sequence[Prompt], context: int | None, max_tokens: int
) -> list[str]:
    """Return a note if answers will end at the context; raise `ConfigError` if one has no room."""
    for row, prompt in zip(rows, prompts, strict=True):
        max_answer_tokens(prompt.location, len(row), max_tokens, context)
    note = clip_note([len(row) for row in rows], max_tokens, context)
    return [] if note is None else [note]
