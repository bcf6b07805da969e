"""Pairs from a model's own answers: judged, revised by principles, or under system prompts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_dpo import DPOConfig
from mlx_dpo.collect.contrastive_pairs import (
    ContrastiveTaskSampler,
    PairRule,
    collect_contrastive,
)
from mlx_dpo.collect.iterative.folder import IterativeSettings
from mlx_dpo.collect.iterative.trainer import IterativeDPO
from mlx_dpo.collect.pairs_file import PROVENANCE, PairsFile
from mlx_dpo.collect.principles.principle_set import PrincipleDraw, read_principles
from mlx_dpo.collect.principles.revise import REVISION_RULE, Reviser
from mlx_dpo.collect.sample import JUDGE_CHUNK, SamplingPlan, judge_all, make_answer_sampler
from mlx_dpo.collect.session import AnswerSampler, TaskSampler
from mlx_dpo.collect.system_contrast import SystemContrast, SystemPrompts
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.prompts import Prompt, make_prompt
from mlx_dpo.evaluation.judge import open_judge
from mlx_dpo.evaluation.rewards import Judge
from mlx_dpo.generation.batch import GeneratedText
from mlx_dpo.paths import tiny_chat
from mlx_dpo.saved_runs.respond import ModelResponder, open_responder
from scripts.studies.parts.lora_and_bits.shipped_model import preferences
from scripts.studies.toy.train import DEFAULTS, write_rows

Pairs = list[dict[str, Any]]
MODEL = tiny_chat().with_name("tiny-critic")
SYSTEMS = SystemPrompts("Answer politely and kindly.", "Answer curtly and rudely.")
REWARD = "mlx_dpo.demo.rules:courteous"  # 1 or 0; of the content it says nothing
TEMPERATURE, MAX_TOKENS = 0.7, 64
ANSWERS = 4  # per prompt, of which the best and the worst make a pair
REPLIES = 3  # per prompt by principles: answer, critique and revision
SETTINGS = DEFAULTS | {
    "fine_tune_type": "lora",
    "beta": 0.5,
    "learning_rate": 1e-3,
    "batch_size": 16,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 1.0,
    "max_length": 128,
}


class Collected(NamedTuple):
    """Pairs, with the number of replies that the model sampled and of those a judge rated."""

    pairs: Pairs
    answers: int
    labels: int


@dataclass(frozen=True)
class CountingResponder(ModelResponder):
    """A model that answers, and counts its replies."""

    counts: list[int] = field(default_factory=list)

    def reply(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[GeneratedText]:
        """Generate one reply per prompt, and count them."""
        self.counts.append(len(prompts))
        return super().reply(prompts, sampling)


class Collector:
    """Collects pairs of one seed from the shipped model; all sources take the same prompts.

    Args:
        folder: folder for the files of pairs.
        seed: seed of the order of the prompts and of the answers.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder / f"pairs-{seed}", seed
        self.sampling = Sampling(temperature=TEMPERATURE, max_tokens=MAX_TOKENS, seed=seed)
        self.responder = open_responder(None, model=str(MODEL))
        rows = preferences("train")
        prompts = {
            prompt.key: prompt
            for index in np.random.default_rng(seed).permutation(len(rows))
            for prompt in [make_prompt(tuple(rows[index]["prompt"]), "prompt")]
        }
        self.prompts = list(prompts.values())

    def judged(self, answers: int) -> Collected:
        """Let the reward choose the best and the worst of 4 answers: `collect --reward`."""
        counting, file = self._start("judged")
        sample = make_answer_sampler(
            [counting], SamplingPlan(answers=ANSWERS, samplings=(self.sampling,))
        )
        prompts = self.prompts[: answers // ANSWERS]
        tasks = TaskSampler(prompts, file, sample, chunk_size=JUDGE_CHUNK, seed=self.seed)
        return self._finish(judge_all(tasks, open_judge(REWARD, None, None)), counting, file)

    def by_principles(self, answers: int) -> Collected:
        """Let the model revise its answers, and the reward confirm: `collect --principles`."""
        counting, file = self._start("principles")
        draw = PrincipleDraw(read_principles(str(MODEL / "principles.txt")), 1, self.seed)
        reviser = Reviser(counting, draw, self.sampling)
        prompts, judge = self.prompts[: answers // REPLIES], open_judge(REWARD, None, None)
        return self._contrast(prompts, reviser, REVISION_RULE, judge, counting, file)

    def by_system_prompts(self, answers: int) -> Collected:
        """Take the answers with two system prompts, without a judge: `collect --system-chosen`."""
        counting, file = self._start(f"contrast-{answers}")
        sample = SystemContrast(counting, self.sampling, SYSTEMS)
        prompts = self.prompts[: answers // 2]
        return self._contrast(prompts, sample, SYSTEMS.rule, None, counting, file)

    def open_loop(self, answers: int, rounds: int, steps: int) -> IterativeDPO:
        """Return `mlx-dpo loop` with as many answers and steps in all; each round has new prompts.

        The package measures every round on a few prompts, which costs little.
        """
        each = answers // ANSWERS // rounds
        prompts, valid = (
            write_rows(self.folder / f"{name}.jsonl", rows)
            for name, rows in (
                ("prompts", ({"prompt": p.messages} for p in self.prompts[: each * rounds])),
                ("valid", preferences("valid")[:ANSWERS]),
            )
        )
        changes = {"max_steps": steps // rounds, "seed": self.seed, "model": str(MODEL)}
        output = {"output": str(self.folder / "loop")}
        return IterativeDPO(
            DPOConfig.from_dict(SETTINGS | changes | output),
            IterativeSettings(
                prompts=str(prompts),
                valid_prompts=str(valid),
                prompts_per_round=each,
                rounds=rounds,
                answers=ANSWERS,
                reference="base",
                reward=REWARD,
                sampling=self.sampling,
            ),
        )

    def _start(self, name: str) -> tuple[CountingResponder, PairsFile]:
        counting = CountingResponder(self.responder.base, self.responder.provenance)
        self.folder.mkdir(exist_ok=True)
        return counting, PairsFile(self.folder / f"{name}.jsonl")

    def _contrast(
        self,
        prompts: Sequence[Prompt],
        sample: AnswerSampler,
        rule: PairRule,
        judge: Judge | None,
        counting: CountingResponder,
        file: PairsFile,
    ) -> Collected:
        tasks = ContrastiveTaskSampler(prompts, file, sample, rule, chunk_size=JUDGE_CHUNK)
        return self._finish(collect_contrastive(tasks, judge), counting, file)

    def _finish(
        self, decisions: Iterable[object], counting: CountingResponder, file: PairsFile
    ) -> Collected:
        for _ in decisions:
            pass
        pairs, labels = read_decisions(file)
        return Collected(pairs, sum(counting.counts), labels)


def run_loop(trainer: IterativeDPO) -> Collected:
    """Run all rounds of a loop; return the pairs and counts of all of them."""
    pairs: Pairs = []
    answers = labels = 0
    for stage in trainer.stages():
        trainer.run_stage(stage)
        if stage.action == "collect":
            file = PairsFile(trainer.paths.round(stage.round).pairs)
            more, rated = read_decisions(file)
            pairs, labels = pairs + more, labels + rated
            answers += ANSWERS * len(file.decisions)
    return Collected(pairs, answers, labels)


def read_decisions(file: PairsFile) -> tuple[Pairs, int]:
    """Return the pairs of a file, and how many answers were rated for it."""
    rows = [decision.row for decision in file.decisions]
    pairs = [
        {name: row[name] for name in ("prompt", "chosen", "rejected")}
        for row in rows
        if "passed" not in row
    ]
    return pairs, sum(len(row[PROVENANCE].get("points", ())) for row in rows)
