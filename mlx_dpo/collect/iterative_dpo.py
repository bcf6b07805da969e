"""Rounds of collecting, training and measuring, each policy collected from by the next round."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any, Self

from mlx_dpo.adapters.files import adapter_digest
from mlx_dpo.collect.iterative_folder import (
    IterativePaths,
    IterativeSettings,
    SplitPrompts,
    Stage,
    next_stage,
    prompts_digest,
    read_split_prompts,
    start_or_resume,
    write_whole,
)
from mlx_dpo.collect.iterative_report import round_page, summary_page
from mlx_dpo.collect.pairs_file import PairsFile
from mlx_dpo.collect.sample import (
    JUDGE_CHUNK,
    SamplingPlan,
    count_outcomes,
    count_truncated,
    judge_all,
    make_answer_sampler,
)
from mlx_dpo.collect.session import TaskSampler
from mlx_dpo.config.dpo_config import DPOConfig, get_settings
from mlx_dpo.config.model import LoRASettings
from mlx_dpo.data.prompts import Prompt
from mlx_dpo.errors import ConfigError
from mlx_dpo.evaluation.judge import check_judge, open_judge
from mlx_dpo.evaluation.rewards import Judge, RewardFunction
from mlx_dpo.evaluation.winrate import compare_pairwise
from mlx_dpo.models.download import resolve_model
from mlx_dpo.models.files import model_fingerprint
from mlx_dpo.runs.folder import RunPaths, lock_folder, read_record
from mlx_dpo.runs.trackers import check_trackers, run_name
from mlx_dpo.runs.trainer import DPOTrainer
from mlx_dpo.saved_runs.respond import Responder, open_responder, open_untrained_responder

ROUND_SEED_STRIDE = 7_919  # between the seeds of rounds; prime, so that they meet late
ADAPTER_SETTINGS_KEPT = (
    "lora_dropout",
    "start_adapter",
)  # what a round may say of an adapter it goes on from


class IterativeDPO:
    """A loop that a program or a notebook can drive.

        with Loop(config, settings) as loop:
            for stage in loop.stages():
                loop.do(stage)

    `config` says how each round is trained; its `pairs` and `output` are set for each round.
    """

    def __init__(
        self, config: DPOConfig, settings: IterativeSettings, *, resume: bool = False
    ) -> None:
        check_judge(settings.reward, settings.judge, settings.rubric)
        if settings.reward is None and settings.judge is None:
            raise ConfigError("who judges is missing; give --reward or --judge")
        self.config, self.settings, self.resume = config, settings, resume
        self.paths = IterativePaths(Path(config.output))
        self._open = ExitStack()
        if settings.reference == "base" and (config.bits or config.start_adapter):
            name = "bits" if config.bits else "start_adapter"
            raise ConfigError(
                f"`{name}` makes the policy begin as another model than the base, which is to be "
                "the reference; convert or fuse it first"
            )
        self.training(settings.rounds)  # what later rounds contradict is to be known now
        check_trackers(config)

    def __enter__(self) -> Self:
        named = self.settings.prompts, self.settings.valid_prompts
        # With the system message from here on: what was collected is told by the whole prompt.
        self.asked: SplitPrompts = read_split_prompts(*named, self.config.system)
        model = resolve_model(
            self.config.model,
            revision=self.config.revision,
            trust_remote_code=self.config.trust_remote_code,
        )
        contents = {
            "the prompts": prompts_digest(self.asked.train),
            "the held-out prompts": prompts_digest(self.asked.valid),
            "the model": model_fingerprint(model),
            "the judge": self.judge.facts(),
        }
        if self.config.start_adapter is not None:
            contents["the start adapter"] = adapter_digest(Path(self.config.start_adapter))
        with ExitStack() as stack:
            stack.enter_context(lock_folder(RunPaths(self.paths.folder)))
            start_or_resume(self.paths, self.config, self.settings, contents, resume=self.resume)
            for number in range(1, self.settings.rounds + 1):
                self.asked.notes.extend(PairsFile(self.paths.round(number).pairs).notes)
            self._open = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    @cached_property
    def judge(self) -> Judge:
        """The reward function, or the model that judges."""
        settings = self.settings
        return open_judge(settings.reward, settings.judge, settings.rubric)

    def stages(self) -> Iterator[Stage]:
        """What is left to do, read off the files each time."""
        while (stage := next_stage(self.paths, self.asked, self.settings)) is not None:
            yield stage

    def do(self, stage: Stage) -> None:
        """Do it, without a word."""
        if stage.todo == "collect":
            for _ in self.collect(stage.round):
                pass
        elif stage.todo == "train":
            with DPOTrainer(self.training(stage.round), resume=True) as run:
                run.prepare()
                for _ in run.train():
                    pass
        else:
            self.evaluate(stage.round)

    # --- the three stages of a round ---------------------------------------------------------

    def voice(self, number: int) -> Responder:
        """The policy as a round leaves it; as it starts, of round 0."""
        if number == 0:
            return open_untrained_responder(self.config)
        return open_responder(str(self.paths.round(number).run.folder))

    def collect(self, number: int) -> Iterator[int]:
        """Judge the last policy's answers; yields how many prompts are left, after each one."""
        voice, settings = self.voice(number - 1), self.settings
        seed = (settings.sampling.seed or 0) + ROUND_SEED_STRIDE * number
        asking = SamplingPlan(
            answers=settings.answers, samplings=(replace(settings.sampling, seed=seed),)
        )
        prompts = self.asked.of_round(number, settings.prompts_per_round)
        picks = PairsFile(self.paths.round(number).pairs)
        questions = TaskSampler(
            prompts, picks, make_answer_sampler([voice], asking), chunk=JUDGE_CHUNK, seed=seed
        )
        yield questions.left
        for _ in judge_all(questions, self.judge):
            yield questions.left
        if not picks.count(picks.pairs):
            why = ", ".join(f"{count} {what}" for what, count in count_outcomes(picks)[1:])
            raise ConfigError(
                f"{picks.path}: no prompt has a better and a worse answer ({why}); use more "
                "--answers or a higher --temperature"
            )

    def training(self, number: int) -> DPOConfig:
        """The settings with which a round is trained.

        Raises:
            ConfigError: they contradict the way the loop goes on from round to round.
        """
        here = self.paths.round(number)
        settings: dict[str, Any] = {"pairs": (str(here.pairs),), "output": str(here.run.folder)}
        if self.config.has_run_name:
            settings["run_name"] = f"{run_name(self.config)}-{here.folder.name}"
        if number > 1:
            known = get_settings()
            own = [f.name for f in fields(LoRASettings) if f.name not in ADAPTER_SETTINGS_KEPT]
            settings |= {name: known[name].default for name in own}
            settings["start_adapter"] = str(self.paths.round(number - 1).run.folder)
            if self.settings.reference == "base":
                settings["reference_model"] = self.config.model
        return replace(self.config, **settings)

    def evaluate(self, number: int) -> dict[str, Any]:
        """Answer the held-out prompts, have the answers judged, and end the round."""
        voice = self.voice(number)
        prompts = self.asked.valid
        answers = voice.say(prompts, self.settings.sampling)
        del voice
        found = self._measured(number, prompts, answers)
        here = self.paths.round(number)
        rounds = [*(self.evaluation(earlier) for earlier in range(number)), found]
        write_whole(here.page, round_page(found))
        write_whole(self.paths.page, summary_page(rounds, str(self.judge.name)))
        # Last: the round is over where it is, and nothing before it is written again.
        write_whole(here.evaluation, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        return found

    def evaluation(self, number: int) -> dict[str, Any]:
        """What was found out about a round that is over."""
        return dict(json.loads(self.paths.round(number).evaluation.read_text("utf-8")))

    def _measured(self, number: int, prompts: list[Prompt], answers: list[str]) -> dict[str, Any]:
        here = self.paths.round(number)
        found: dict[str, Any] = {"round": number, "mean_characters": fmean(map(len, answers))}
        if isinstance(self.judge, RewardFunction):
            asked = zip(prompts, answers, strict=True)
            found["mean_reward"] = fmean(self.judge(p.messages, text) for p, text in asked)
        said = {"now": answers}
        if number:
            picks = PairsFile(here.pairs)
            found |= {"collected": dict(count_outcomes(picks)), "cut": count_truncated(picks)}
            record = read_record(here.run) or {}
            found["held_out_pairs"] = record.get("evaluation")
            for name, other in (("base", 0), ("before", number - 1)):
                said[name] = [shown["now"] for shown in self.evaluation(other)["answers"]]
                found[f"against_{name}"] = compare_pairwise(
                    self.judge, prompts, answers, said[name]
                ).to_dict()
        found["answers"] = [
            {"prompt": list(prompt.messages)} | {name: texts[at] for name, texts in said.items()}
            for at, prompt in enumerate(prompts)
        ]
        return found
