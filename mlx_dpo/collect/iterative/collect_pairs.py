"""Pairs of a round of iterative DPO: the best and worst of several answers, or revised answers."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

from mlx_dpo.collect.contrastive_pairs import ContrastiveTaskSampler, collect_contrastive
from mlx_dpo.collect.iterative.folder import IterativeSettings
from mlx_dpo.collect.pairs_file import PairsFile
from mlx_dpo.collect.principles.judge import (
    check_principle_judge,
    judge_drawn,
    open_principle_judge,
)
from mlx_dpo.collect.principles.principle_set import (
    PrincipleDraw,
    principles_digest,
    read_principles,
)
from mlx_dpo.collect.principles.revise import REVISION_RULE, SENT_TO_CRITIC, Reviser
from mlx_dpo.collect.sample import (
    JUDGE_CHUNK,
    SamplingPlan,
    describe_outcomes,
    describe_ties,
    judge_all,
    make_answer_sampler,
)
from mlx_dpo.collect.session import TaskSampler
from mlx_dpo.data.prompts import Prompt
from mlx_dpo.errors import ConfigError
from mlx_dpo.evaluation.judge import check_judge, open_judge
from mlx_dpo.evaluation.rewards import Judge
from mlx_dpo.generation.responder import Responder
from mlx_dpo.saved_runs.respond import open_any_responder

ROUND_SEED_STRIDE = 7_919  # between the seeds of rounds; a prime, so that seeds rarely coincide


class PairCollector:
    """Collector of the pairs of all rounds, with the judge that they share.

    With principles, the judge is the initial policy unless a reward or a judge is given; it is the
    same in every round.

    Args:
        settings: settings of the loop.
        open_initial: function that loads the initial policy.

    Raises:
        ConfigError: the settings contradict each other, there is no judge, or the file of
            principles is wrong.
    """

    def __init__(self, settings: IterativeSettings, open_initial: Callable[[], Responder]) -> None:
        self.settings, self._open_initial = settings, open_initial
        self.connection = settings.connect()
        judging = settings.reward, settings.judge, settings.rubric
        if settings.principles is not None:
            check_principle_judge(*judging)
            principles = read_principles(settings.principles)
            self._draw = PrincipleDraw(principles, settings.revisions or 1)
            return
        check_judge(*judging)
        if settings.reward is None and settings.judge is None:
            raise ConfigError("missing judge: pass --reward or --judge")

    @cached_property
    def judge(self) -> Judge:
        """Judge of answers: a reward, a model or the initial policy, loaded at first use.

        It compares answers to held-out prompts by principles that are drawn once for all rounds.
        """
        settings = self.settings
        judging = settings.reward, settings.judge, settings.rubric
        if settings.principles is None:
            return open_judge(*judging, self.connection)
        is_given = (settings.reward or settings.judge) is not None
        judge = open_principle_judge(
            *judging,
            connection=self.connection,
            responder=None if is_given else self._open_initial(),
        )
        return judge_drawn(judge, self._draw)

    @cached_property
    def critic(self) -> Responder | None:
        """What criticises answers, loaded at first use; None for the policy itself."""
        if self.settings.critic is None:
            return None
        return open_any_responder(self.settings.critic, self.connection, sends=SENT_TO_CRITIC)

    def input_digests(self) -> dict[str, Any]:
        """Return digests of what the pairs depend on, which a resume compares."""
        digests = {"the judge": self.judge.provenance()}
        if self.settings.principles is not None:
            digests["the principles"] = {"digest": principles_digest(self._draw.principles)}
        if self.critic is not None:
            digests["the critic"] = self.critic.provenance
        return digests

    def collect(
        self, round_number: int, policy: Responder, prompts: list[Prompt], pairs_file: PairsFile
    ) -> Iterator[int]:
        """Collect the pairs of a round with a policy; yield how many prompts remain, as it goes.

        Raises:
            ConfigError: no prompt gave a pair.
        """
        seed = (self.settings.sampling.seed or 0) + ROUND_SEED_STRIDE * round_number
        by_principles = self.settings.principles is not None
        start = self._start_revisions if by_principles else self._start_ranking
        tasks, decisions = start(policy, prompts, pairs_file, seed)
        yield tasks.remaining
        for _ in decisions:
            yield tasks.remaining
        if not pairs_file.pair_count:
            reasons = describe_ties(pairs_file) or describe_outcomes(pairs_file)
            other = "another judge, other --principles"
            advice = other if by_principles else "another reward, more --answers"
            raise ConfigError(
                f"{pairs_file.path}: no prompt has a better and a worse answer ({reasons}); use "
                f"{advice} or a higher --temperature"
            )

    def _start_ranking(
        self, policy: Responder, prompts: list[Prompt], pairs_file: PairsFile, seed: int
    ) -> tuple[TaskSampler, Iterator[object]]:
        """Return tasks of several answers to each prompt, and the decisions on them."""
        sampling = replace(self.settings.sampling, seed=seed)
        plan = SamplingPlan(answers=self.settings.answers, samplings=(sampling,))
        sample_answers = make_answer_sampler([policy], plan)
        tasks = TaskSampler(prompts, pairs_file, sample_answers, chunk_size=JUDGE_CHUNK, seed=seed)
        return tasks, judge_all(tasks, self.judge)

    def _start_revisions(
        self, policy: Responder, prompts: list[Prompt], pairs_file: PairsFile, seed: int
    ) -> tuple[TaskSampler, Iterator[object]]:
        """Return tasks of an answer and its revision, and the decisions on them.

        Each round draws other principles for its prompts, and the judge compares by them.
        """
        draw = replace(self._draw, seed=seed)
        sampling = replace(self.settings.sampling, seed=seed)
        temperature = self.settings.revision_temperature or 0.0
        reviser = Reviser(policy, draw, sampling, self.critic, temperature)
        tasks = ContrastiveTaskSampler(
            prompts, pairs_file, reviser, REVISION_RULE, chunk_size=JUDGE_CHUNK
        )
        return tasks, collect_contrastive(tasks, judge_drawn(self.judge, draw))
