"""The folder of an iterative DPO run (`mlx-dpo loop`): its files, its record and its next stage.

The next stage is determined from the files alone, so the program can be killed at any moment.
"""

import json
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mlx_dpo.collect.pairs_file import PairsFile
from mlx_dpo.collect.sample import SamplingPlan
from mlx_dpo.config.dpo_config import DPOConfig, rename_earlier_settings
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.prompts import Prompt, add_system_prompt, read_held_out_prompts, read_prompts
from mlx_dpo.errors import ConfigError, RunError
from mlx_dpo.io.atomic import is_temporary, write_file
from mlx_dpo.io.checksums import read_checked_json, to_checked_json
from mlx_dpo.openai_client.connection import Connection, bind_connection
from mlx_dpo.runs.folder import RunPaths, read_record

HELD_OUT_FRACTION = 0.1
CHANGEABLE_SETTINGS = (
    "rounds",
    "on_collapse",
    "allow_remote",
    "api_key_env",
    "max_concurrency",
    "request_timeout",
)  # settings of iterative DPO that may change on resume

Action = Literal["collect", "train", "evaluate"]


class Stage(NamedTuple):
    """A round's number and the action to take in it: collect pairs, train or evaluate."""

    round: int
    action: Action


@dataclass(frozen=True, kw_only=True)
class IterativeSettings:
    """The settings of iterative DPO other than the training settings of each round.

    Raises:
        ConfigError: a setting is out of its bounds.
    """

    prompts: str
    valid_prompts: str | None = None
    prompts_per_round: int | None = None
    rounds: int = 3
    answers: int = 4
    reference: Literal["previous", "base"] = "previous"
    reward: str | None = None
    judge: str | None = None
    rubric: str | None = None
    principles: str | None = None  # file; None for the best and worst of several answers
    revisions: int | None = None  # with principles; None for one
    revision_temperature: float | None = None  # with principles; None for greedy decoding
    critic: str | None = None
    # Of the connection to a judge or a critic at an address.
    allow_remote: bool = False
    api_key_env: str | None = None  # the name of the variable; the key is stored nowhere
    max_concurrency: int = 4
    request_timeout: float = 600.0
    on_collapse: Literal["warn", "stop"] = "warn"
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=1.0, seed=0))

    def __post_init__(self) -> None:
        for name in ("rounds", "prompts_per_round"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"`{name}` must be at least 1, got {value}")
        if self.prompts == "-":
            raise ConfigError("prompts are read in every round, but `-` can be read only once")
        if self.principles is None:
            SamplingPlan(answers=self.answers, samplings=(self.sampling,)).check(1)
        for name in ("revisions", "revision_temperature", "critic"):
            if self.principles is None and getattr(self, name) is not None:
                raise ConfigError(f"`{name}` has no effect without --principles")
        self.connect()

    def connect(self) -> Connection:
        """Return the settings of the connection to the judge and the critic.

        Raises:
            ConfigError: an address may not be used, or a setting has no effect.
        """
        connection = Connection(
            allow_remote=self.allow_remote,
            api_key_env=self.api_key_env,
            max_concurrency=self.max_concurrency,
            request_timeout=self.request_timeout,
        )
        return bind_connection(connection, [self.judge, self.critic])


class SplitPrompts(NamedTuple):
    """The prompts of iterative DPO, split into training and held-out prompts."""

    train: list[Prompt]
    valid: list[Prompt]
    notes: list[str]

    def for_round(self, number: int, count: int | None) -> list[Prompt]:
        """Return the training prompts for which round `number` (1 or more) samples answers.

        `count` is the number of prompts per round: each round takes the next ones, and after the
        last prompt the first. None: all training prompts.
        """
        if count is None or count >= len(self.train):
            return self.train
        start = (number - 1) * count
        return [self.train[index % len(self.train)] for index in range(start, start + count)]


def read_split_prompts(
    prompts: str, valid_prompts: str | None, system: str | None = None
) -> SplitPrompts:
    """Read training and held-out prompts without overlap, and add the `system` message to each.

    Raises:
        DataError, ConfigError: there are no prompts, or too few to hold some out.
    """
    train = read_prompts(prompts)
    if valid_prompts is not None:
        valid = read_held_out_prompts(valid_prompts) or read_prompts(valid_prompts)
    else:
        valid = read_held_out_prompts(prompts) or _sample_held_out(train)
    train, valid = add_system_prompt(train, system), add_system_prompt(valid, system)
    keys = {prompt.key for prompt in valid}
    train = [prompt for prompt in train if prompt.key not in keys]
    if not train:
        raise ConfigError(f"{prompts}: every prompt is held out; give more of them")
    source = valid_prompts or prompts
    notes = [f"{len(train):,} prompts to collect with, {len(valid):,} held out ({source})"]
    return SplitPrompts(train, valid, notes)


def _sample_held_out(prompts: Sequence[Prompt]) -> list[Prompt]:
    count = max(1, round(HELD_OUT_FRACTION * len(prompts)))
    indices = random.Random(0).sample(range(len(prompts)), count)
    return [prompts[index] for index in sorted(indices)]


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Return the SHA-256 digest of the prompts, which depends on their order, in hex."""
    return sha256("".join(prompt.key for prompt in prompts).encode()).hexdigest()


@dataclass(frozen=True)
class RoundPaths:
    """The paths of one round's files. Round 0 only evaluates the initial policy."""

    folder: Path

    @property
    def pairs(self) -> Path:
        """File of the preference pairs that are collected in the round."""
        return self.folder / "pairs.jsonl"

    @property
    def run(self) -> RunPaths:
        """Run folder of the training on the collected pairs."""
        return RunPaths(self.folder / "run")

    @property
    def evaluation(self) -> Path:
        """File of the held-out prompts' answers and evaluation; it is written last in the round."""
        return self.folder / "evaluation.json"

    @property
    def page(self) -> Path:
        """Markdown page with the round's evaluation."""
        return self.folder / "results.md"

    @property
    def is_collapsed(self) -> bool:
        """Whether the answers of the finished round have collapsed."""
        return bool(read_checked_json(self.evaluation)[0].get("collapse"))

    @property
    def is_trained(self) -> bool:
        """Whether the training run of the round is finished."""
        record = read_record(self.run)
        return record is not None and record["state"] == "finished"


@dataclass(frozen=True)
class IterativePaths:
    """The paths of an iterative DPO run's files."""

    folder: Path

    @property
    def record(self) -> Path:
        """Path of `loop.json`, which stores the settings and the digests of all inputs."""
        return self.folder / "loop.json"

    @property
    def page(self) -> Path:
        """Markdown page that summarizes the run, with one line per round."""
        return self.folder / "results.md"

    @property
    def html_page(self) -> Path:
        """HTML page of the run: rounds, charts, answers and settings."""
        return self.folder / "loop.html"

    def round(self, number: int) -> RoundPaths:
        """Return the paths of the files of round `number`."""
        return RoundPaths(self.folder / f"round-{number:02d}")


def next_stage(
    paths: IterativePaths, prompts: SplitPrompts, settings: IterativeSettings
) -> Stage | None:
    """Return the first stage whose result is missing in the folder, or None if no stage is left."""
    for number in range(settings.rounds + 1):
        round_paths = paths.round(number)
        if round_paths.evaluation.is_file():
            if settings.on_collapse == "stop" and round_paths.is_collapsed:
                return None
            continue
        if number and not round_paths.is_trained:
            wanted = prompts.for_round(number, settings.prompts_per_round)
            decided_keys = PairsFile(round_paths.pairs).decided_keys
            is_collected = all(prompt.key in decided_keys for prompt in wanted)
            return Stage(number, "train" if is_collected else "collect")
        return Stage(number, "evaluate")
    return None


def write_durable(path: Path, text: str) -> None:
    """Write a file atomically: flush the text to disk, then replace any old file."""
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
    """Write `loop.json` into an empty folder, or check that a resumed run has the same inputs.

    Raises:
        RunError: the folder contains other files, or its run was started with other inputs.
    """
    record = {"loop": asdict(settings), "settings": config.to_dict(), "contents": digests}
    record = json.loads(json.dumps(record))
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
                f"{paths.folder}: holds a loop; add --resume to continue it, or choose "
                "another --output"
            )
        _check_unchanged(paths, earlier, record, config)
    write_durable(paths.record, to_checked_json(record))


def read_loop_record(paths: IterativePaths) -> dict[str, Any] | None:
    """Read `loop.json`; return None if the folder has no such file.

    Raises:
        RunError: the file is not the record of an iterative DPO run.
    """
    if not os.path.lexists(paths.record):
        return None
    record = read_checked_json(paths.record)[0]
    try:
        record["settings"] = rename_earlier_settings(dict(record["settings"]))
        DPOConfig.from_dict(record["settings"])
        return {name: dict(record[name]) for name in ("loop", "settings", "contents")}
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise RunError(f"{paths.record}: not the state of a loop ({error})") from error


def _check_unchanged(
    paths: IterativePaths, earlier: dict[str, Any], record: dict[str, Any], config: DPOConfig
) -> None:
    """Raise `RunError` if a setting or an input has changed since the run began."""
    for name, value in earlier["loop"].items():
        if name not in CHANGEABLE_SETTINGS and record["loop"].get(name) != value:
            raise _changed_error(paths, name, value, record["loop"].get(name))
    earlier_config = DPOConfig.from_dict(earlier["settings"])
    if (name := earlier_config.find_difference(config)) is not None:
        raise _changed_error(paths, name, getattr(earlier_config, name), getattr(config, name))
    for name, digest in earlier["contents"].items():
        if record["contents"].get(name) != digest:
            raise RunError(
                f"{paths.folder}: {name} changed since the loop began; restore the earlier content"
            )


def _changed_error(paths: IterativePaths, name: str, earlier: object, now: object) -> RunError:
    return RunError(
        f"{paths.folder}: the loop began with {name} = {earlier!r}, not {now!r}; resume with the "
        "same settings, or choose another --output"
    )
