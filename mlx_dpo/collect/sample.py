"""Sample several answers per prompt, and let a reward function or a judge model choose pairs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any

from mlx_dpo.collect.pairs_file import PROVENANCE, Decision, PairsFile
from mlx_dpo.collect.session import (
    TIE,
    Answer,
    AnswerSampler,
    RankingTask,
    TaskSampler,
    make_pair,
)
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.prompts import Prompt
from mlx_dpo.errors import ConfigError
from mlx_dpo.evaluation.judge import check_verdicts
from mlx_dpo.evaluation.rewards import Judge, Ranking, common_score
from mlx_dpo.generation.batch import GeneratedText
from mlx_dpo.generation.responder import Responder
from mlx_dpo.saved_runs.respond import open_responder, response_provenance, with_chunk_seed

JUDGE_CHUNK = 16  # prompts in a chunk for a judge
PERSON_CHUNK = 4  # prompts in a chunk for a person, who should not wait long

# Makes a decision of a task, the judge's ranking, and the judge's provenance.
Decide = Callable[[RankingTask, Ranking, Mapping[str, Any]], Decision]


@dataclass(frozen=True, kw_only=True)
class SamplingPlan:
    """Rule for which model and which sampling settings produce each answer to a prompt.

    The first answers use each model and each sampling setting at least once. If there are enough
    answers, each model uses each sampling setting.
    """

    answers: int = 2
    samplings: tuple[Sampling, ...] = (Sampling(temperature=1.0, seed=0),)

    def check(self, model_count: int) -> None:
        """Check the plan for `model_count` models.

        Raises:
            ConfigError: there are fewer than two answers, two answers would be identical, or a
                model or a temperature would be unused.
        """
        if self.answers < 2:
            raise ConfigError(f"`answers` must be at least 2, got {self.answers}")
        for name, count in (("runs", model_count), ("temperatures", len(self.samplings))):
            if count > self.answers:
                raise ConfigError(
                    f"`answers` {self.answers} leaves some of the {count} {name} without an "
                    f"answer; use --answers {count}"
                )
        for (_, sampling), positions in self.assign(model_count).items():
            if len(positions) > 1 and self.samplings[sampling].temperature == 0:
                raise ConfigError(
                    "`temperature` 0 gives the same answer each time; set one above 0"
                )

    def assign(self, model_count: int) -> dict[tuple[int, int], list[int]]:
        """Return the answers that each model generates with each of the sampling settings.

        Keys are (index of the model, index in `samplings`). Values are indices of answers.
        """
        assignment: dict[tuple[int, int], list[int]] = {}
        samplings = len(self.samplings)
        for position in range(self.answers):
            # After each full cycle the models move on to their next sampling.
            cycle = position // lcm(model_count, samplings)
            indices = (position % model_count, (position + cycle) % samplings)
            assignment.setdefault(indices, []).append(position)
        return assignment


def make_answer_sampler(responders: Sequence[Responder], plan: SamplingPlan) -> AnswerSampler:
    """Return a function that samples answers to a chunk of prompts as the plan says."""

    def sample_answers(prompts: Sequence[Prompt], chunk: int) -> list[list[Answer]]:
        answers: list[dict[int, Answer]] = [{} for _ in prompts]
        for (model, setting), positions in plan.assign(len(responders)).items():
            responder = responders[model]
            sampling = with_chunk_seed(plan.samplings[setting], chunk, positions[0])
            replies = responder.reply([p for p in prompts for _ in positions], sampling)
            source = response_provenance(responder, sampling)
            for number, reply in enumerate(replies):
                prompt, repeat = divmod(number, len(positions))
                answers[prompt][positions[repeat]] = make_answer(reply, source)
        return [[by_position[p] for p in sorted(by_position)] for by_position in answers]

    return sample_answers


def make_answer(reply: GeneratedText, source: dict[str, Any]) -> Answer:
    """Return an answer of a generated text and what produced it."""
    return Answer(reply.text, source, reply.is_truncated, reply.finish_reason == "context")


def open_responders(runs: Sequence[str], model: str | None) -> list[Responder]:
    """Load what answers the prompts: the trained policies of `runs`, or one model without a run.

    Raises:
        ConfigError: neither or both of `runs` and `model` are given.
    """
    if bool(runs) == (model is not None):
        raise ConfigError("name run folders or a --model, and only one of the two")
    return [open_responder(run) for run in runs] or [open_responder(None, model=model)]


def decide(task: RankingTask, ranking: Ranking, provenance: Mapping[str, Any]) -> Decision:
    """Return a pair of best and worst answer, or a skip on a tie or an unreliable verdict."""
    provenance = ranking_provenance(ranking, provenance)
    if ranking.is_tie or ranking.warnings:
        texts = tuple(answer.text for answer in task.answers)
        why = (*ranking.warnings, TIE)[0]
        return Decision(task.prompt, provenance, skip_reason=why, answers=texts)
    return make_pair(task, ranking.best, ranking.worst, provenance)


def ranking_provenance(ranking: Ranking, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return the judge's provenance with its scores, and its replies if it is a model."""
    replies = list(ranking.judge_replies)
    scores = {"points": list(ranking.scores)} | ({"judge_replies": replies} if replies else {})
    return {**provenance, **scores}


def judge_all(
    tasks: TaskSampler, judge: Judge, decide: Decide = decide
) -> Iterator[tuple[RankingTask, Decision]]:
    """Let the judge decide every remaining task; store each decision, then yield (task, decision).

    Raises:
        ConfigError: the judge fails, or gives no verdict on any task of the first chunk.
    """
    provenance, has_verdicts = judge.provenance(), False
    for chunk in tasks.chunks():
        texts = [[answer.text for answer in task.answers] for task in chunk]
        rankings = judge.rank([task.prompt.messages for task in chunk], texts)
        if not has_verdicts and chunk:
            check_verdicts(judge.name, rankings)
            has_verdicts = True
        for task, ranking in zip(chunk, rankings, strict=True):
            decision = decide(task, ranking, provenance)
            tasks.pairs_file.add(decision)
            yield task, decision


def count_outcomes(pairs_file: PairsFile) -> list[tuple[str, int]]:
    """Return (label, count): first the pairs, then the skipped prompts for each reason."""
    reasons: dict[str, int] = {}
    for decision in pairs_file.decisions:
        if decision.file is pairs_file.skipped:
            why = str(decision.row["passed"])
            reasons[why] = reasons.get(why, 0) + 1
    return [("pairs", pairs_file.pair_count), *sorted(reasons.items(), key=lambda item: -item[1])]


def describe_ties(pairs_file: PairsFile) -> str | None:
    """Return which answers a reward or a judge scored equally; None if no tie has scores.

    A person's ties have no scores.
    """
    sources = [
        decision.row[PROVENANCE]
        for decision in pairs_file.decisions
        if decision.file is pairs_file.skipped and decision.row["passed"] == TIE
    ]
    ties = [source for source in sources if _scores(source)]
    if not ties:
        return None
    judge = str(ties[0].get("by")).partition(" ")[0]  # `reward NAME` or `judge NAME`
    scores = [score for source in ties for score in _scores(source)]
    score = common_score(scores)
    shown = f"({min(scores)} to {max(scores)})" if score is None else f"({score})"
    if not pairs_file.pair_count and score is not None:
        return f"the {judge} gave every answer the same score {shown}"
    count = len(ties)
    where = "1 prompt" if count == 1 else f"each of {count:,} prompts"
    return f"the {judge} gave all answers to {where} the same score {shown}"


def _scores(source: Mapping[str, Any]) -> list[float]:
    """Return the scores in the provenance of a decision, which is read from a file."""
    points = source.get("points")
    return [p for p in points if isinstance(p, int | float)] if isinstance(points, list) else []


def describe_outcomes(pairs_file: PairsFile) -> str:
    """Return the number of pairs, and the number of prompts without a pair by reason, as text."""
    (_, pairs), *skipped = count_outcomes(pairs_file)
    text = f"{pairs:,} pair{'s' * (pairs != 1)}"
    if not skipped:
        return text
    count = sum(n for _, n in skipped)
    reasons = ", ".join(f"{why}: {n:,}" for why, n in skipped)
    return f"{text}; no pair for {count:,} prompt{'s' * (count != 1)} ({reasons})"


def count_truncated(pairs_file: PairsFile) -> int:
    """Count the chosen answers that were cut at the token limit.

    A policy trained on such answers would learn to stop in the middle of an answer.
    """
    sources = (
        decision.row["provenance"].get("chosen_from", {}) for decision in pairs_file.decisions
    )
    return sum(bool(source.get("cut")) for source in sources)


def count_context_full(pairs_file: PairsFile) -> int:
    """Count the chosen answers that were cut at the end of the model's context."""
    sources = (
        decision.row["provenance"].get("chosen_from", {}) for decision in pairs_file.decisions
    )
    return sum(bool(source.get("context_full")) for source in sources)
