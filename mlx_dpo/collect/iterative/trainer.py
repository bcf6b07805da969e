"""Iterative (on-policy) DPO: each round samples pairs from the last policy and trains on them."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any, Self

from mlx_dpo.adapters.adapter_files import adapter_digest
from mlx_dpo.collect.iterative.collapse import measure_health
from mlx_dpo.collect.iterative.collect_pairs import PairCollector
from mlx_dpo.collect.iterative.folder import (
    IterativePaths,
    IterativeSettings,
    SplitPrompts,
    Stage,
    next_stage,
    prompts_digest,
    read_split_prompts,
    start_or_resume,
    write_durable,
)
from mlx_dpo.collect.iterative.page import render_loop_page
from mlx_dpo.collect.iterative.report import round_page, summary_page
from mlx_dpo.collect.pairs_file import PairsFile
from mlx_dpo.collect.sample import count_outcomes, count_truncated
from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.data.prompts import Prompt
from mlx_dpo.distributed.environment import find_rank
from mlx_dpo.errors import ConfigError
from mlx_dpo.evaluation.rewards import Judge
from mlx_dpo.evaluation.winrate import compare_pairwise
from mlx_dpo.io.checksums import read_checked_json, to_checked_json
from mlx_dpo.models.download import resolve_model
from mlx_dpo.models.files import model_fingerprint
from mlx_dpo.runs.folder import RunPaths, lock_folder, read_record
from mlx_dpo.runs.trackers import check_trackers, run_name
from mlx_dpo.runs.trainer import DPOTrainer
from mlx_dpo.saved_runs.respond import ModelResponder, open_responder, open_untrained_responder
from mlx_dpo.training.monitor.samples import find_collapse
from mlx_dpo.training.monitor.verdict import Verdict


class IterativeDPO:
    """Iterative DPO from prompts, without given preference pairs. The caller runs each stage:

        with IterativeDPO(config, settings) as trainer:
            for stage in trainer.stages():
                trainer.run_stage(stage)

    Every round has three stages: collect pairs from the previous policy, train on the pairs,
    evaluate on held-out prompts. Round 0 only evaluates the initial policy.

    Args:
        config: the training settings of each round; `pairs` and `output` are set per round.
        resume: continue the run in `config.output`.

    Raises:
        ConfigError: the settings contradict each other.
    """

    def __init__(
        self, config: DPOConfig, settings: IterativeSettings, *, resume: bool = False
    ) -> None:
        if find_rank(os.environ) is not None:
            raise ConfigError("iterative DPO runs in one process; start it without the launcher")
        self.config, self.settings, self.resume = config, settings, resume
        self.pair_collector = PairCollector(settings, partial(self.load_policy, 0))
        self.connection = self.pair_collector.connection
        self.paths = IterativePaths(Path(config.output))
        self._resources = ExitStack()
        if settings.reference == "base" and (config.bits or config.start_adapter):
            name = "bits" if config.bits else "start_adapter"
            raise ConfigError(
                f"`{name}` makes the initial policy differ from the base model, which must be the "
                "reference; convert or fuse it first"
            )
        self.round_config(settings.rounds)  # to detect contradictions in later rounds now
        check_trackers(config)

    def __enter__(self) -> Self:
        settings = self.settings
        # The system message is part of the prompts: decisions are stored by the whole prompt.
        self.prompts: SplitPrompts = read_split_prompts(
            settings.prompts, settings.valid_prompts, self.config.system
        )
        digests = self._input_digests()
        with ExitStack() as stack:
            stack.enter_context(lock_folder(RunPaths(self.paths.folder)))
            start_or_resume(self.paths, self.config, settings, digests, resume=self.resume)
            for round_number in range(1, settings.rounds + 1):
                self.prompts.notes.extend(PairsFile(self.paths.round(round_number).pairs).notes)
            self._resources = stack.pop_all()
        return self

    def _input_digests(self) -> dict[str, Any]:
        """Return digests of the inputs, such as prompts and model, which a resume compares."""
        model = resolve_model(
            self.config.model,
            revision=self.config.revision,
            trust_remote_code=self.config.trust_remote_code,
        )
        digests = {
            "the prompts": prompts_digest(self.prompts.train),
            "the held-out prompts": prompts_digest(self.prompts.valid),
            "the model": model_fingerprint(model),
            **self.pair_collector.input_digests(),
        }
        if self.config.start_adapter is not None:
            digests["the start adapter"] = adapter_digest(Path(self.config.start_adapter))
        return digests

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._resources.close()

    @property
    def judge(self) -> Judge:
        """Judge of the answers, loaded at first use."""
        return self.pair_collector.judge

    def stages(self) -> Iterator[Stage]:
        """Yield the stages that are still to run.

        Run each stage before asking for the next one, which is determined from the run's files.
        """
        while (stage := next_stage(self.paths, self.prompts, self.settings)) is not None:
            yield stage

    @property
    def last_round(self) -> int:
        """Number of the last round that is finished; 0 if only the initial policy is evaluated."""
        numbers = range(self.settings.rounds + 1)
        finished = (n for n in numbers if self.paths.round(n).evaluation.is_file())
        return max(finished, default=0)

    def run_stage(self, stage: Stage) -> None:
        """Run a stage (collect pairs, train or evaluate) without printing anything."""
        if stage.action == "collect":
            for _ in self.collect(stage.round):
                pass
        elif stage.action == "train":
            with DPOTrainer(self.round_config(stage.round), resume=True) as trainer:
                trainer.prepare()
                for _ in trainer.steps():
                    pass
        else:
            self.evaluate(stage.round)

    def load_policy(self, round_number: int) -> ModelResponder:
        """Load the policy that training in a round produced; for round 0, the initial policy."""
        if round_number == 0:
            return open_untrained_responder(self.config)
        return open_responder(str(self.paths.round(round_number).run.folder))

    def collect(self, round_number: int) -> Iterator[int]:
        """Collect the preference pairs of a round with the policy of the round before.

        At the start and after each judged prompt, yield the number of prompts that remain.

        Raises:
            ConfigError: no prompt gave a pair.
        """
        settings = self.settings
        policy = self.load_policy(round_number - 1)
        self._note_context(policy, self.prompts.train)
        prompts = self.prompts.for_round(round_number, settings.prompts_per_round)
        pairs_file = PairsFile(self.paths.round(round_number).pairs)
        yield from self.pair_collector.collect(round_number, policy, prompts, pairs_file)

    def _note_context(self, policy: ModelResponder, prompts: list[Prompt]) -> None:
        """Add a note if answers will end at the model's context, once for the same prompts."""
        note = policy.clip_note(prompts, self.settings.sampling.max_tokens)
        if note is not None and note not in self.prompts.notes:
            self.prompts.notes.append(note)

    def round_config(self, round_number: int) -> DPOConfig:
        """Return the training settings of a round.

        From round 2 on, training starts from the previous round's adapter, with its LoRA settings.

        Raises:
            ConfigError: the settings contradict `start_adapter` or `reference_model`, which this
                method sets in later rounds.
        """
        paths = self.paths.round(round_number)
        changes: dict[str, Any] = {"pairs": (str(paths.pairs),), "output": str(paths.run.folder)}
        if self.config.has_run_name:
            changes["run_name"] = f"{run_name(self.config)}-{paths.folder.name}"
        if round_number > 1:
            if self.settings.reference == "base":
                changes["reference_model"] = self.config.model
            earlier = str(self.paths.round(round_number - 1).run.folder)
            return replace(self.config, **changes).starting_from(earlier)
        return replace(self.config, **changes)

    def evaluate(self, round_number: int) -> dict[str, Any]:
        """Evaluate the policy of a round on the held-out prompts, and write the results.

        A round is finished when its file `evaluation.json` exists.
        """
        policy = self.load_policy(round_number)
        prompts = self.prompts.valid
        self._note_context(policy, prompts)
        replies = policy.reply(prompts, self.settings.sampling)
        answers = [reply.text for reply in replies]
        has_base = round_number > 0 and self.config.fine_tune_type != "full"
        health = measure_health(policy, prompts, replies, has_base=has_base)
        del policy  # before a judge model computes
        evaluation = self._evaluate_answers(round_number, prompts, answers)
        evaluation |= self._find_faults(round_number, health)
        paths = self.paths.round(round_number)
        rounds = [*(self.read_evaluation(earlier) for earlier in range(round_number)), evaluation]
        write_durable(paths.page, round_page(evaluation))
        judge = str(self.judge.name)
        write_durable(self.paths.page, summary_page(rounds, judge))
        page = render_loop_page(self.config, self.settings, judge, rounds)
        write_durable(self.paths.html_page, page)
        # Last: the round is over with this file, and no earlier file is written again.
        write_durable(paths.evaluation, to_checked_json(evaluation))
        return evaluation

    def _find_faults(self, round_number: int, health: dict[str, float]) -> dict[str, Any]:
        """Return the measures of the answers, their collapse, and the verdict on the training."""
        faults: dict[str, Any] = {"health": health, "collapse": None, "training": None}
        if round_number:
            base = self.read_evaluation(0).get("health") or {}
            faults["collapse"] = find_collapse(health, base)
            record = read_record(self.paths.round(round_number).run) or {}
            verdict = Verdict.from_record(record)
            faults["training"] = verdict and verdict.text
        return faults

    def read_evaluation(self, round_number: int) -> dict[str, Any]:
        """Read `evaluation.json` of a finished round."""
        return read_checked_json(self.paths.round(round_number).evaluation)[0]

    def _evaluate_answers(
        self, round_number: int, prompts: list[Prompt], answers: list[str]
    ) -> dict[str, Any]:
        """Return the content of `evaluation.json`: rewards, win rates and the answers."""
        evaluation: dict[str, Any] = {
            "round": round_number,
            "mean_characters": fmean(map(len, answers)),
        }
        if self.judge.scores_are_rewards:
            messages = [prompt.messages for prompt in prompts]
            rankings = self.judge.rank(messages, [[text] for text in answers])
            rated = [ranking.scores[0] for ranking in rankings if not ranking.warnings]
            evaluation["mean_reward"] = fmean(rated)
        columns = {"now": answers}
        if round_number:
            paths = self.paths.round(round_number)
            pairs_file = PairsFile(paths.pairs)
            evaluation["collected"] = dict(count_outcomes(pairs_file))
            evaluation["cut"] = count_truncated(pairs_file)
            record = read_record(paths.run) or {}
            evaluation["held_out_pairs"] = record.get("evaluation")
            for name, earlier in (("base", 0), ("before", round_number - 1)):
                columns[name] = [row["now"] for row in self.read_evaluation(earlier)["answers"]]
                comparison = compare_pairwise(self.judge, prompts, answers, columns[name])
                evaluation[f"against_{name}"] = comparison.to_dict()
        evaluation["answers"] = [
            {"prompt": list(prompt.messages)} | {name: texts[i] for name, texts in columns.items()}
            for i, prompt in enumerate(prompts)
        ]
        return evaluation
