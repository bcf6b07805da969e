"""The folder of a loop: where everything lies, what it was begun with, and what is left to do.

Where a loop stands is read off its files alone, so that it can be ended at any moment.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mlx_dpo.collect.pairs_file import PairsFile
from mlx_dpo.collect.sample import SamplingPlan
from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.prompts import Prompt, add_system_prompt, read_held_out_prompts, read_prompts
from mlx_dpo.errors import ConfigError, RunError
from mlx_dpo.io.atomic import is_temporary, write_file
from mlx_dpo.runs.folder import RunPaths, read_record

HELD_OUT_FRACTION = 0.1


class SplitPrompts(NamedTuple):
    """The prompts of a loop."""

    train: list[Prompt]
    valid: list[Prompt]
    notes: list[str]

    def of_round(self, number: int, count: int | None) -> list[Prompt]:
        """Those of round 1, 2, …: all, or the next `count`, from the beginning again at the end."""
        if count is None or count >= len(self.train):
            return self.train
        start = (number - 1) * count
        return [self.train[at % len(self.train)] for at in range(start, start + count)]


def read_split_prompts(
    prompts: str, valid_prompts: str | None, system: str | None = None
) -> SplitPrompts:
    """Prompts to collect with and to measure on, each with a system turn; none is in both.

    Raises:
        DataError, ConfigError: there are none, or too few to hold some out.
    """
    train = read_prompts(prompts)
    if valid_prompts is not None:
        valid = read_held_out_prompts(valid_prompts) or read_prompts(valid_prompts)
    else:
        valid = read_held_out_prompts(prompts) or _sample_held_out(train)
    train, valid = add_system_prompt(train, system), add_system_prompt(valid, system)
    keys = {prompt.key for prompt in valid}
    kept = [prompt for prompt in train if prompt.key not in keys]
    if not kept:
        raise ConfigError(f"{prompts}: every prompt is held out; give more of them")
    asked_of = valid_prompts or prompts
    notes = [f"{len(kept):,} prompts to collect with, {len(valid):,} held out ({asked_of})"]
    return SplitPrompts(kept, valid, notes)


def _sample_held_out(prompts: Sequence[Prompt]) -> list[Prompt]:
    count = max(1, round(HELD_OUT_FRACTION * len(prompts)))
    places = random.Random(0).sample(range(len(prompts)), count)
    return [prompts[at] for at in sorted(places)]


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256 over the prompts in order, in hex."""
    return sha256("".join(prompt.key for prompt in prompts).encode()).hexdigest()


CHANGEABLE_SETTINGS = ("rounds",)  # settings of a loop that may be raised when it goes on

Action = Literal["collect", "train", "evaluate"]


class Stage(NamedTuple):
    """Something that is left to be done."""

    round: int
    todo: Action


@dataclass(frozen=True, kw_only=True)
class IterativeSettings:
    """What a loop does beside training."""

    prompts: str
    valid_prompts: str | None = None
    prompts_per_round: int | None = None
    rounds: int = 3
    answers: int = 4
    reference: Literal["previous", "base"] = "previous"
    reward: str | None = None
    judge: str | None = None
    rubric: str | None = None
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=1.0, seed=0))

    def __post_init__(self) -> None:
        for name in ("rounds", "prompts_per_round"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"`{name}` must be at least 1, got {value}")
        if self.prompts == "-":
            raise ConfigError("prompts are read in every round; `-` can be read but once")
        SamplingPlan(answers=self.answers, samplings=(self.sampling,)).check(1)


@dataclass(frozen=True)
class RoundPaths:
    """The files of one round; round 0 is the policy as it starts, which has answers alone."""

    folder: Path

    @property
    def pairs(self) -> Path:
        """What was collected, with what was passed over beside it."""
        return self.folder / "pairs.jsonl"

    @property
    def run(self) -> RunPaths:
        """What was trained on it."""
        return RunPaths(self.folder / "run")

    @property
    def evaluation(self) -> Path:
        """Answers to the held-out prompts and what the judge made of them; ends the round."""
        return self.folder / "evaluation.json"

    @property
    def page(self) -> Path:
        """The same for a person."""
        return self.folder / "results.md"

    @property
    def trained(self) -> bool:
        """Whether its run came to its end."""
        record = read_record(self.run)
        return record is not None and record["state"] == "finished"


@dataclass(frozen=True)
class IterativePaths:
    """The files of a loop."""

    folder: Path

    @property
    def record(self) -> Path:
        """Settings, and digests of what the loop depends on."""
        return self.folder / "loop.json"

    @property
    def page(self) -> Path:
        """A line for each round."""
        return self.folder / "results.md"

    def round(self, number: int) -> RoundPaths:
        """Of round 1, 2, …"""
        return RoundPaths(self.folder / f"round-{number:02d}")


def next_stage(
    paths: IterativePaths, asked: SplitPrompts, settings: IterativeSettings
) -> Stage | None:
    """The first thing that the files of the loop do not show as done; None at the end."""
    for number in range(settings.rounds + 1):
        here = paths.round(number)
        if here.evaluation.is_file():
            continue
        if number and not here.trained:
            wanted = asked.of_round(number, settings.prompts_per_round)
            done = PairsFile(here.pairs).done
            collected = all(prompt.key in done for prompt in wanted)
            return Stage(number, "train" if collected else "collect")
        return Stage(number, "evaluate")
    return None


def write_whole(path: Path, text: str) -> None:
    """Write or replace a file of the loop; its content is on the disk before its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, text, durable=True)


def start_or_resume(
    paths: IterativePaths,
    config: DPOConfig,
    settings: IterativeSettings,
    digests: dict[str, Any],
    *,
    resume: bool,
) -> None:
    """Write what the loop is begun with, or see that it goes on with the same.

    Raises:
        RunError: the folder holds something else, or a loop of another result.
    """
    now = {"loop": asdict(settings), "settings": config.to_dict(), "contents": digests}
    now = json.loads(json.dumps(now))
    if not paths.record.is_file():
        others = {path.name for path in paths.folder.iterdir() if not is_temporary(path)}
        others.discard(".lock")
        if others:
            raise RunError(
                f"{paths.folder}: not empty and not the folder of a loop (found "
                f"`{min(others)}`); choose another --output"
            )
    else:
        earlier = read_loop_record(paths)
        assert earlier is not None
        if not resume:
            raise RunError(
                f"{paths.folder}: holds a loop; add --resume to go on with it, or choose "
                "another --output"
            )
        _check_unchanged(paths, earlier, now, config)
    write_whole(paths.record, json.dumps(now, indent=2) + "\n")


def read_loop_record(paths: IterativePaths) -> dict[str, Any] | None:
    """What `loop.json` says, or None where there is none.

    Raises:
        RunError: it cannot be read as the record of a loop.
    """
    if not paths.record.is_file():
        return None
    try:
        record = json.loads(paths.record.read_text("utf-8"))
        DPOConfig.from_dict(record["settings"])
        return {name: dict(record[name]) for name in ("loop", "settings", "contents")}
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{paths.record}: not the record of a loop ({error})") from error


def _check_unchanged(
    paths: IterativePaths, earlier: dict[str, Any], now: dict[str, Any], config: DPOConfig
) -> None:
    for name, value in earlier["loop"].items():
        if name not in CHANGEABLE_SETTINGS and now["loop"].get(name) != value:
            raise _changed_error(paths, name, value, now["loop"].get(name))
    before = DPOConfig.from_dict(earlier["settings"])
    if (name := before.find_difference(config)) is not None:
        raise _changed_error(paths, name, getattr(before, name), getattr(config, name))
    for name, content in earlier["contents"].items():
        if now["contents"].get(name) != content:
            raise RunError(
                f"{paths.folder}: {name} changed since the loop began; restore what was there"
            )


def _changed_error(paths: IterativePaths, name: str, before: object, now: object) -> RunError:
    return RunError(
        f"{paths.folder}: the loop began with {name} = {before!r}, not {now!r}; resume with the "
        "same settings, or choose another --output"
    )
