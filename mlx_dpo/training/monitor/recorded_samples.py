"""Answers sampled at the evaluations of a run, as texts in its samples file."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.nn as nn

from mlx_dpo.data.chat_templates.render import has_template
from mlx_dpo.errors import ModelError
from mlx_dpo.generation.batch import GeneratedTokens
from mlx_dpo.generation.decode import decode_tokens
from mlx_dpo.generation.prompt import encode_prompt
from mlx_dpo.reporting.samples import EvaluationSamples, Sample, SampledText, SamplesLog
from mlx_dpo.training.monitor.samples import AnswerSampler

MARKERS = ("Qx1q", "Qx2q", "Qx3q")  # texts of turns that a chat template is rendered with

UserTurn = Callable[[Sequence[int]], tuple[str, int]]


class RecordedSampler:
    """An answer sampler whose answers are also written to a run's samples file."""

    def __init__(
        self,
        sampler: AnswerSampler,
        tokenizer: Any,
        log: SamplesLog,
        *,
        thinking: bool | None = None,
    ) -> None:
        """Record the answers of `sampler` in `log`.

        Args:
            thinking: whether prompts are rendered with the thinking mode of the chat template.
        """
        self.sampler, self.log = sampler, log
        self._tokenizer = tokenizer
        user_turn = make_user_turn_finder(tokenizer, thinking=thinking)
        self._prompts = [user_turn(prompt) for prompt in sampler.prompts]
        self._base: Sequence[SampledText | None] | None = None

    @property
    def latest(self) -> EvaluationSamples | None:
        """Samples of the last evaluation of the run; None before the first one."""
        return self.log.latest

    def remember_untrained(self, policy: nn.Module) -> None:
        """Sample the answers of the untrained policy, and use them as the base's.

        After full fine-tuning the base's weights are gone, so they are sampled before it.
        """
        self._base = self._texts(self.sampler.sample(policy))

    def measure(self, policy: nn.Module, step: int) -> dict[str, float]:
        """Sample answers at optimizer step `step`, record them, and return their metrics."""
        metrics = self.sampler.measure(policy)
        if self._base is None:
            self._base = self._base_texts()
        answers = self._texts(self.sampler.answers)
        samples = tuple(
            Sample(prompt, turn, base, answer)
            for (prompt, turn), base, answer in zip(self._prompts, self._base, answers, strict=True)
        )
        self.log.write(EvaluationSamples(step, samples))
        return metrics

    def _base_texts(self) -> Sequence[SampledText | None]:
        """Return the base's answers: as sampled, or of an earlier evaluation of the run."""
        if self.sampler.base_answers is not None:
            return self._texts(self.sampler.base_answers)
        count = len(self._prompts)
        latest = self.log.latest
        if latest is not None and len(latest.samples) == count:
            return [sample.base for sample in latest.samples]
        return [None] * count

    def _texts(self, answers: Sequence[GeneratedTokens]) -> list[SampledText]:
        return [
            SampledText(decode_tokens(self._tokenizer, answer.tokens), answer.stop_token is None)
            for answer in answers
        ]


def make_user_turn_finder(tokenizer: Any, *, thinking: bool | None) -> UserTurn:
    """Return a function that finds the last user turn in the token ids of a prompt.

    The function returns the turn's text and its number among the user turns, from 1. It looks for
    the text that the chat template writes before and after a user turn. A prompt without it, such
    as a plain text, is returned whole, without its special tokens.
    """
    frame = _user_turn_frame(tokenizer, thinking)

    def find(prompt: Sequence[int]) -> tuple[str, int]:
        if frame is not None:
            before, after = frame
            text = str(tokenizer.decode(list(prompt)))
            if text.endswith(after) and before in text:
                text = text.removesuffix(after)
                return text.rpartition(before)[2].strip(), text.count(before)
        return str(tokenizer.decode(list(prompt), skip_special_tokens=True)).strip(), 1

    return find


def _user_turn_frame(tokenizer: Any, thinking: bool | None) -> tuple[str, str] | None:
    """Return the text that the chat template writes before a user turn, and after the last one.

    The result is None if there is no chat template, or if it does not show the turns.
    """
    if not has_template(tokenizer):
        return None
    roles = ("user", "assistant", "user")
    turns = [{"role": r, "content": m} for r, m in zip(roles, MARKERS, strict=True)]
    try:
        alone, later = (
            str(tokenizer.decode(encode_prompt(tokenizer, messages, thinking=thinking)))
            for messages in (turns[:1], turns)
        )
    except ModelError:
        return None
    first, answer, last = MARKERS
    head, found, after = alone.partition(first)
    between, found_later, after_later = later.partition(answer)[2].partition(last)
    before = _common_suffix(head, between)
    if not (found and found_later and before.strip() and after == after_later):
        return None
    return before, after


def _common_suffix(first: str, second: str) -> str:
    length = 0
    for ours, theirs in zip(reversed(first), reversed(second), strict=False):
        if ours != theirs:
            break
        length += 1
    return first[len(first) - length :]
