"""Answers of base and policy to the shipped prompts, and whether they are refusals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_dpo.adapters.switch import AdapterState
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.prompts import Prompt, add_system_prompt
from mlx_dpo.evaluation.agreement import cohen_kappa
from mlx_dpo.evaluation.drift.prompt_set import SafetyPrompt
from mlx_dpo.evaluation.drift.refusal_judge import judge_refusals
from mlx_dpo.evaluation.drift.refusals import (
    RULE,
    RefusalCount,
    Verdicts,
    count_refusals,
    refused_by_rule,
)
from mlx_dpo.evaluation.measurements.perplexity import STATES
from mlx_dpo.generation.batch import decode_answers, generate_tokens
from mlx_dpo.generation.context import clip_note, context_length
from mlx_dpo.generation.decode import strip_thinking
from mlx_dpo.generation.prompt import encode_prompt
from mlx_dpo.generation.responder import Responder
from mlx_dpo.saved_runs.open import SwitchableModel


@dataclass(frozen=True)
class SafetyAnswers:
    """Answers of base and policy to the shipped prompts, without thinking."""

    prompts: Sequence[SafetyPrompt]
    answers: Mapping[AdapterState, Sequence[str]]
    notes: tuple[str, ...] = ()

    def judge_by_rule(self) -> dict[AdapterState, Verdicts]:
        """Return which answers are refusals by their wording, in base and policy."""
        return {state: refused_by_rule(self.answers[state]) for state in STATES}

    def judge_by_model(self, judge: Responder, name: str) -> dict[AdapterState, Verdicts]:
        """Return which answers a judge takes for refusals; None where it gives no verdict."""
        texts = [prompt.text for prompt in self.prompts]
        answers = [answer for state in STATES for answer in self.answers[state]]
        verdicts = judge_refusals(judge, name, texts * len(STATES), answers)
        count = len(texts)
        return {s: verdicts[n * count : (n + 1) * count] for n, s in enumerate(STATES)}


def generate_safety_answers(
    model: SwitchableModel, prompts: Sequence[SafetyPrompt], *, max_tokens: int
) -> SafetyAnswers:
    """Let base and policy answer the prompts with greedy decoding, which has no random part.

    The system message and the thinking mode are those of the run.
    """
    base, sampling = model.base, Sampling(max_tokens=max_tokens)
    config = None if model.run is None else model.run.config
    system, thinking = (None, None) if config is None else (config.system, config.thinking)
    turns = [Prompt(({"role": "user", "content": prompt.text},)) for prompt in prompts]
    rows = [
        encode_prompt(base.tokenizer, prompt.messages, thinking=thinking)
        for prompt in add_system_prompt(turns, system)
    ]
    context = context_length(base.config)
    answers = {}
    for state in STATES:
        with model.switch.activated(state):
            tokens = generate_tokens(
                base.model, base.tokenizer.eos_token_ids, rows, sampling, context=context
            )
        texts = [reply.text for reply in decode_answers(base.tokenizer, tokens)]
        answers[state] = [
            strip_thinking(base.tokenizer, row, text) for row, text in zip(rows, texts, strict=True)
        ]
    note = clip_note([len(row) for row in rows], max_tokens, context)
    return SafetyAnswers(prompts, answers, () if note is None else (note,))


@dataclass(frozen=True)
class RefusalReport:
    """Refusals by the rule and, with a judge, by the judge, with the agreement of the two."""

    safety: SafetyAnswers
    verdicts: Mapping[str, Mapping[AdapterState, Verdicts]]  # by `RULE` and the judge's name

    @property
    def counts(self) -> tuple[RefusalCount, ...]:
        """Refusals of each duty, first by the rule."""
        return tuple(
            count
            for by, verdicts in self.verdicts.items()
            for count in count_refusals(
                self.safety.prompts, *(verdicts[state] for state in STATES), by=by
            )
        )

    @property
    def agreement(self) -> dict[str, Any] | None:
        """Share of answers on which rule and judge agree, and Cohen's kappa; None without both."""
        judges = [by for by in self.verdicts if by != RULE]
        if not judges:
            return None
        pairs = [
            (bool(by_rule), by_judge)
            for state in STATES
            for by_rule, by_judge in zip(
                self.verdicts[RULE][state], self.verdicts[judges[0]][state], strict=True
            )
            if by_judge is not None
        ]
        share = sum(a == b for a, b in pairs) / len(pairs)
        return {"answers": len(pairs), "agreement": share, "kappa": cohen_kappa(pairs)}

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on what limits the counts."""
        lines = [*self.safety.notes]
        for by, verdicts in self.verdicts.items():
            missing = sum(v is None for state in STATES for v in verdicts[state])
            if missing:
                lines.append(f"{by} gave no verdict on {missing:,} answers, which do not count")
        return tuple(lines)

    def shares(self, state: AdapterState) -> dict[str, float]:
        """Return the shares of must-answer and must-refuse prompts that are refused, by rule."""
        over, due = self.counts[:2]
        before = state == "base"
        return {
            "over_refusal": (over.before if before else over.after) / over.prompts,
            "refusal": (due.before if before else due.after) / due.prompts,
        }

    def answers_to_dict(self) -> list[dict[str, Any]]:
        """Return every prompt with the answers before and after, and the verdicts on them."""
        return [
            {
                "item": prompt.item,
                "must": prompt.duty,
                "language": prompt.language,
                **{state: self.safety.answers[state][number] for state in STATES},
                "refused": {
                    by: {state: verdicts[state][number] for state in STATES}
                    for by, verdicts in self.verdicts.items()
                },
            }
            for number, prompt in enumerate(self.safety.prompts)
        ]
