"""Contrastive pairs: two answers of which the better one is known from how they were made.

A revised answer should be better than the first one, and an answer under a good system prompt
better than one under a bad system prompt. A judge may confirm this; pairs that it does not confirm
are skipped, with the reason.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_dpo.collect.pairs_file import Decision, PairsFile
from mlx_dpo.collect.sample import judge_all, ranking_provenance
from mlx_dpo.collect.session import (
    NOBODY,
    Answer,
    AnswerSampler,
    RankingTask,
    TaskSampler,
    make_pair,
)
from mlx_dpo.data.prompts import Prompt
from mlx_dpo.evaluation.rewards import Judge, Ranking


@dataclass(frozen=True)
class PairRule:
    """Rule that makes a pair of the better and the worse answer to a prompt, in this order.

    Args:
        better: name of the better answer, in the reasons why there is no pair.
        worse: name of the worse answer.
        method: how the answers were made, to be stored with a pair that no judge confirms.
    """

    better: str
    worse: str
    method: str

    def find_fault(self, answers: Sequence[Answer]) -> str | None:
        """Return why two answers make no pair: one is empty, or both are the same; else None."""
        better, worse = answers
        for name, answer in ((self.worse, worse), (self.better, better)):
            if answer.fault is not None or not answer.text.strip():
                return answer.fault or f"{name} is empty"
        if better.text.strip() == worse.text.strip():
            return f"{self.better} is the same as {self.worse}"
        return None

    def decide(
        self, task: RankingTask, ranking: Ranking, provenance: Mapping[str, Any]
    ) -> Decision:
        """Return a pair if the judge prefers the better answer, in both orders; else a skip."""
        provenance = ranking_provenance(ranking, provenance)
        better, worse = ranking.scores
        if better > worse and not ranking.warnings:
            return make_pair(task, 0, 1, provenance)
        verdict = "worse" if better < worse else "no better"
        why = (*ranking.warnings, f"{self.better} is {verdict} than {self.worse}")[0]
        return _make_skip(task.prompt, task.answers, why, provenance)


class ContrastiveTaskSampler(TaskSampler):
    """Sampler of tasks of two answers, the better one first; see `TaskSampler`.

    A prompt whose answers make no pair is skipped, and the reason is stored in `pairs_file`.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        pairs_file: PairsFile,
        sample_answers: AnswerSampler,
        rule: PairRule,
        *,
        chunk_size: int,
    ) -> None:
        super().__init__(prompts, pairs_file, sample_answers, chunk_size=chunk_size, seed=0)
        self.rule = rule

    def make_task(self, prompt: Prompt, answers: Sequence[Answer]) -> RankingTask | None:
        """Return a task of the two answers in their order; None if they make no pair."""
        return None if self.rule.find_fault(answers) else RankingTask(prompt, tuple(answers))

    def make_skip(self, prompt: Prompt, answers: Sequence[Answer]) -> Decision:
        """Return the decision to skip a prompt whose answers make no pair, with the reason."""
        why = self.rule.find_fault(answers)
        assert why is not None
        return _make_skip(prompt, answers, why, {"by": NOBODY})


def _make_skip(
    prompt: Prompt, answers: Sequence[Answer], why: str, provenance: dict[str, Any]
) -> Decision:
    sources = {"answers_from": [answer.provenance() for answer in answers]}
    texts = tuple(answer.text for answer in answers)
    return Decision(prompt, provenance | sources, skip_reason=why, answers=texts)


def collect_contrastive(tasks: ContrastiveTaskSampler, judge: Judge | None) -> Iterator[Decision]:
    """Decide every remaining prompt that has two answers; store each decision, then yield it.

    Args:
        tasks: sampler of the two answers to each prompt.
        judge: must prefer the better answer; None to take every pair.

    Raises:
        ConfigError: the judge fails, or gives no verdict on any task of the first chunk.
    """
    if judge is not None:
        for _, decision in judge_all(tasks, judge, tasks.rule.decide):
            yield decision
        return
    for task in (task for chunk in tasks.chunks() for task in chunk):
        decision = make_pair(task, 0, 1, {"by": tasks.rule.method})
        tasks.pairs_file.add(decision)
        yield decision
