"""Training in stages in one folder, which can be resumed wherever it was stopped or killed."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.data.columns import prompt_keys
from mlx_dpo.data.sources import STDIN, find_sources
from mlx_dpo.distributed.environment import find_rank
from mlx_dpo.errors import ConfigError, RunError, reason
from mlx_dpo.io.atomic import is_temporary, write_file
from mlx_dpo.io.checksums import read_checked_json, to_checked_json
from mlx_dpo.runs.folder import RunPaths, lock_folder, read_record
from mlx_dpo.runs.inputs import Inputs, load_inputs
from mlx_dpo.runs.stages.find import STAGES_RECORD
from mlx_dpo.runs.stages.settings import Stage, StageSettings


class StagedTraining:
    """Instruction tuning, then training on preferences. The caller trains each stage:

        with StagedTraining(settings) as training:
            for number, stage in training.stages():
                with DPOTrainer(stage.config, resume=True) as trainer: …

    Each stage is a whole run in a folder of its own. The next stage is found from the runs' files
    alone, so that the program can be killed at any moment.

    Args:
        settings: the settings of the stages, as given.
        resume: continue the stages in the output folder.

    Raises:
        ConfigError: the settings contradict each other.
        DataError: on entering the context, rows of a stage do not exist.
    """

    def __init__(self, settings: StageSettings, *, resume: bool = False) -> None:
        if find_rank(os.environ) is not None:
            raise ConfigError("`stages` run in one process; train one after the other with ranks")
        self.settings, self.resume = settings, resume
        self.all_stages = settings.stages()
        self._resources = ExitStack()

    def __enter__(self) -> Self:
        self._check_sources()
        self._check_folder()
        with ExitStack() as stack:
            stack.enter_context(lock_folder(RunPaths(self.settings.output)))
            self._start_or_resume()
            self._resources = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # If an error ends the program before a stage begins, a corrected command can begin again.
        if kind is not None and not any(map(has_begun, self.all_stages)):
            (self.settings.output / STAGES_RECORD).unlink(missing_ok=True)
        self._resources.close()

    def stages(self) -> Iterator[tuple[int, Stage]]:
        """Yield number (from 1) and stage of those that are not finished.

        Train each before asking for the next one.

        Raises:
            RunError: a stage was not finished.
        """
        for number, stage in enumerate(self.all_stages, start=1):
            if not is_finished(stage):
                yield number, stage
            if not is_finished(stage):
                raise RunError(f"{stage.config.output}: the stage `{stage.name}` is not finished")

    def _check_sources(self) -> None:
        """Raise an error if the rows of a stage that has not begun are not to be found."""
        if all(STDIN in stage.config.pairs for stage in self.all_stages):
            raise ConfigError("`-` is standard input, which only one of the stages can read")
        for config in (s.config for s in self.all_stages if not has_begun(s)):
            find_sources(config.pairs, config.valid, config.split)

    def _check_folder(self) -> None:
        """Raise `RunError` if the folder has other files, or stages that are not to be resumed."""
        folder = self.settings.output
        if (folder / STAGES_RECORD).is_file():
            if not self.resume and any(map(has_begun, self.all_stages)):
                advice = "add --resume to continue them, or choose another --output"
                raise RunError(f"{folder}: holds stages; {advice}")
            return
        found = folder.iterdir() if folder.is_dir() else ()
        # A process that was killed at once leaves its lock and a temporary file.
        others = {path.name for path in found if not is_temporary(path)}
        if others := others - {RunPaths(folder).lock.name}:
            raise RunError(
                f"{folder}: not empty and without stages (found `{min(others)}`); choose another "
                "--output"
            )

    def _start_or_resume(self) -> None:
        """Write the record of the stages, or check that a resumed training has the same settings.

        Raises:
            RunError: all stages are finished, or have other settings.
        """
        folder = self.settings.output
        earlier = read_stages(folder)
        if earlier is not None and any(map(has_begun, earlier.stages())):
            self._check_unchanged(earlier)
        record = json.loads(json.dumps(self.settings.to_dict()))
        write_file(folder / STAGES_RECORD, to_checked_json(record), durable=True)

    def _check_unchanged(self, earlier: StageSettings) -> None:
        """Raise `RunError` if all stages are finished, or if a setting differs from `earlier`."""
        folder = self.settings.output
        if all(map(is_finished, self.all_stages)):
            last = self.all_stages[-1].config.output
            raise RunError(
                f"{folder}: all stages are finished; to train further: --start-adapter {last}, "
                "with another --output"
            )
        for before, now in zip(earlier.stages(), self.all_stages, strict=True):
            name = before.config.find_difference(now.config)
            if before.name != now.name or name is not None:
                raise RunError(
                    f"{folder}: the stage `{before.name}` began with another `{name or 'stages'}`; "
                    "resume with the same settings, or choose another --output"
                )


def has_begun(stage: Stage) -> bool:
    """Return whether the run of a stage has begun."""
    return os.path.lexists(RunPaths(Path(stage.config.output)).record)


def count_trained_before(first: DPOConfig, inputs: Inputs) -> int:
    """Return how many held-out examples of the last stage have a prompt that the first trains on.

    Both stages hold out the same prompts if they read the same rows. They do not if one of them
    drops a row, or if the first has rows of its own.

    Args:
        first: settings of the first stage.
        inputs: model and examples of the last stage.
    """
    earlier = load_inputs(first, read=lambda _: inputs.base)
    trained = set(prompt_keys(earlier.train))
    return sum(key in trained for key in prompt_keys(inputs.valid))


def is_finished(stage: Stage) -> bool:
    """Return whether the run of a stage is finished."""
    record = read_record(RunPaths(Path(stage.config.output)))
    return record is not None and record["state"] == "finished"


def read_stages(folder: Path) -> StageSettings | None:
    """Read the settings of the stages in a folder; None if the folder has no stages.

    Raises:
        RunError: the record is damaged, or not one of stages.
    """
    path = folder.expanduser() / STAGES_RECORD
    if not os.path.lexists(path):
        return None
    record: dict[str, Any] = read_checked_json(path)[0]
    try:
        values = dict(record["settings"]) | {"output": str(folder)}
        settings = StageSettings(tuple(record["stages"]), values, dict(record["sft"]))
        settings.stages()
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise RunError(f"{path}: not a record of stages ({reason(error)})") from error
    return settings
