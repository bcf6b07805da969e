"""The wiring of a collection: who answers, who decides, and where the picks go."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import lcm

from mlx_dpo.collect.pairs_file import Decision, PairsFile
from mlx_dpo.collect.session import TIE, Answer, RankingTask, SampleAnswers, TaskSampler, make_pair
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.prompts import Prompt
from mlx_dpo.errors import ConfigError
from mlx_dpo.evaluation.judge import check_verdicts
from mlx_dpo.evaluation.rewards import Judge, Ranking
from mlx_dpo.saved_runs.respond import Responder, derive_seed, open_responder, response_provenance

JUDGE_CHUNK = 16  # prompts that a judge is given at once
PERSON_CHUNK = 4  # few, so that nobody waits long


@dataclass(frozen=True, kw_only=True)
class SamplingPlan:
    """How answers are sampled: `answers` of them, by the voices and samplings in turn.

    The first ones have every voice and every sampling; enough of them have each voice with each.

    Raises:
        ConfigError: two answers could not differ, or a voice or sampling would have no answer.
    """

    answers: int = 2
    samplings: tuple[Sampling, ...] = (Sampling(temperature=1.0, seed=0),)

    def check(self, voices: int) -> None:
        """Refuse what `voices` voices cannot do."""
        if self.answers < 2:
            raise ConfigError(f"`answers` must be at least 2, got {self.answers}")
        for what, count in (("runs", voices), ("temperatures", len(self.samplings))):
            if count > self.answers:
                raise ConfigError(
                    f"`answers` {self.answers} leaves some of the {count} {what} without an "
                    f"answer; use --answers {count}"
                )
        for places in self.places(voices).values():
            if len(places) > 1 and self.samplings[places[0] % len(self.samplings)].temperature == 0:
                raise ConfigError(
                    "`temperature` 0 gives the same answer each time; set one above 0"
                )

    def places(self, voices: int) -> dict[tuple[int, int], list[int]]:
        """Places of answers by voice and sampling."""
        places: dict[tuple[int, int], list[int]] = {}
        samplings = len(self.samplings)
        for place in range(self.answers):
            around = place // lcm(voices, samplings)  # then each voice meets its next sampling
            of = (place % voices, (place + around) % samplings)
            places.setdefault(of, []).append(place)
        return places


def make_answer_sampler(voices: Sequence[Responder], asking: SamplingPlan) -> SampleAnswers:
    """A function of prompts and the number of their chunk, which seeds what is sampled."""

    def sample(prompts: Sequence[Prompt], chunk: int) -> list[list[Answer]]:
        answers: list[dict[int, Answer]] = [{} for _ in prompts]
        for (who, how), places in asking.places(len(voices)).items():
            voice, sampling = voices[who], asking.samplings[how]
            if sampling.seed is not None:
                sampling = replace(sampling, seed=derive_seed(sampling.seed, chunk, places[0]))
            replies = voice.reply([p for p in prompts for _ in places], sampling)
            for number, reply in enumerate(replies):
                of, place = divmod(number, len(places))
                said = Answer(reply.text, response_provenance(voice, sampling), reply.is_cut)
                answers[of][places[place]] = said
        return [[of[place] for place in sorted(of)] for of in answers]

    return sample


def open_responders(runs: Sequence[str], model: str | None) -> list[Responder]:
    """The policies of runs, or a model.

    Raises:
        ConfigError: neither or both are named.
    """
    if bool(runs) == (model is not None):
        raise ConfigError("name run folders or a --model, and only one of the two")
    return [open_responder(run) for run in runs] or [open_responder(None, model=model)]


def judge_all(asked: TaskSampler, judge: Judge) -> Iterator[tuple[RankingTask, Decision]]:
    """Every question that is left with what the judge made of it, written before it is yielded.

    Raises:
        ConfigError: the judge fails, or gives no verdict on any question of a whole chunk.
    """
    facts, heard = judge.facts(), False
    for questions in asked.chunks():
        texts = [[answer.text for answer in question.answers] for question in questions]
        rankings = judge.rank([question.prompt.messages for question in questions], texts)
        if not heard and questions:
            check_verdicts(judge.name, rankings)
            heard = True
        for question, ranking in zip(questions, rankings, strict=True):
            pick = decide(question, ranking, facts)
            asked.picks.add(pick)
            yield question, pick


def decide(question: RankingTask, ranking: Ranking, facts: dict[str, object]) -> Decision:
    """The pair of the best and the worst answer; none where they tie or the judge is in doubt."""
    told_by = dict(facts) | {"points": list(ranking.points)}
    if ranking.said:
        told_by |= {"said": list(ranking.said)}
    if ranking.is_tie or ranking.doubts:
        texts = tuple(answer.text for answer in question.answers)
        return Decision(question.prompt, told_by, passed=(*ranking.doubts, TIE)[0], answers=texts)
    return make_pair(question, ranking.best, ranking.worst, told_by)


def count_outcomes(picks: PairsFile) -> list[tuple[str, int]]:
    """How many prompts became pairs, and why others did not, the commonest reason first."""
    reasons: dict[str, int] = {}
    for kept in picks.order:
        if kept.journal is picks.passed:
            why = str(kept.row["passed"])
            reasons[why] = reasons.get(why, 0) + 1
    rest = sorted(reasons.items(), key=lambda item: -item[1])
    return [("pairs", picks.count(picks.pairs)), *rest]


def count_truncated(picks: PairsFile) -> int:
    """How many chosen answers end where their tokens ran out, and would teach to stop there."""
    sources = (kept.row["provenance"].get("chosen_from", {}) for kept in picks.order)
    return sum(bool(source.get("cut")) for source in sources)
