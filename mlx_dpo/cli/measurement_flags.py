"""Flags of `mlx-dpo eval`: perplexity, reference answers and benchmark tasks."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from mlx_dpo.cli.command import FILE, FOLDER
from mlx_dpo.errors import ConfigError

if TYPE_CHECKING:
    from mlx_dpo.evaluation.measurements.measurement import Measure

Command = Callable[..., Any]

# Flags that belong to a measurement, and its flag.
NEEDED = {
    "window": "perplexity",
    "stride": "perplexity",
    "tasks_folder": "tasks",
    "num_fewshot": "tasks",
    "apply_chat_template": "tasks",
}
SHARED = ("limit", "max_tokens")  # flags of tasks and of reference answers
FLAGS = (
    click.option(
        "--perplexity",
        type=FILE,
        metavar="FILE",
        help="Perplexity of a text file, or of rows with `text`, before and after training.",
    ),
    click.option(
        "--window",
        type=click.IntRange(min=2),
        help="Tokens of a window of --perplexity.",
        show_default="the model's context, at most 2048",
    ),
    click.option(
        "--stride",
        type=click.IntRange(min=1),
        help="Tokens by which windows of --perplexity move.",
        show_default="half a window",
    ),
    click.option(
        "--reference-answers",
        type=FILE,
        metavar="FILE",
        help="Compare greedy answers with those of FILE (rows with `prompt` and `answer`), before "
        "and after training: ROUGE-L and exact match.",
    ),
    click.option(
        "--tasks",
        metavar="NAME,...",
        help="Benchmark tasks of lm-eval, before and after training; needs the extra `tasks`.",
    ),
    click.option(
        "--tasks-folder",
        type=FOLDER,
        metavar="FOLDER",
        help="Folder with tasks of your own (YAML); Python code that they name is run.",
    ),
    click.option(
        "-n",
        "--limit",
        type=click.IntRange(min=1),
        help="Documents per task of --tasks, and rows of --reference-answers, from the beginning.",
        show_default="all",
    ),
    click.option(
        "--num-fewshot",
        type=click.IntRange(min=0),
        help="Examples in each prompt of --tasks.",
        show_default="as in the task",
    ),
    click.option(
        "--apply-chat-template/--no-apply-chat-template",
        default=None,
        help="Put prompts of --tasks into the chat template.",
        show_default="as in training",
    ),
    click.option(
        "--max-tokens",
        type=click.IntRange(min=1),
        help="Maximum number of tokens per answer of --tasks and --reference-answers.",
        show_default="as in the task; 512 for reference answers",
    ),
)


def measurement_flags(command: Command) -> Command:
    """Add the flags of all measurements of this module to a command."""
    for decorate in reversed(FLAGS):
        command = decorate(command)
    return command


def prepare_measurements(flags: Mapping[str, Any]) -> "list[Measure]":
    """Return the measurements that the flags ask for; files are read, and no model is loaded.

    Raises:
        ConfigError: a flag has no effect, or a task is unknown.
        DataError: a file cannot be read.
    """
    for name, needed in NEEDED.items():
        if flags[name] is not None and flags[needed] is None:
            flag = name.replace("_", "-")
            raise ConfigError(f"`--{flag}` has no effect without --{needed}")
    for name in SHARED:
        if flags[name] is not None and flags["tasks"] is flags["reference_answers"] is None:
            flag = name.replace("_", "-")
            raise ConfigError(f"`--{flag}` has no effect without --tasks or --reference-answers")
    measures = []
    if flags["tasks"] is not None:
        measures.append(_prepare_tasks(flags))
    if flags["perplexity"] is not None:
        from mlx_dpo.evaluation.measurements.perplexity import Windows, prepare_perplexity

        windows = Windows(flags["window"], flags["stride"])
        measures.append(prepare_perplexity(flags["perplexity"], windows))
    if flags["reference_answers"] is not None:
        from mlx_dpo.evaluation.measurements.reference_answers import prepare_reference_answers

        limits = {"limit": flags["limit"], "max_tokens": flags["max_tokens"]}
        measures.append(prepare_reference_answers(flags["reference_answers"], **limits))
    return measures


def _prepare_tasks(flags: Mapping[str, Any]) -> "Measure":
    from mlx_dpo.evaluation.measurements.tasks import TaskOptions, prepare_tasks

    names = [name.strip() for name in flags["tasks"].split(",") if name.strip()]
    if not names:
        raise ConfigError("`--tasks` names no task; separate names with commas")
    options = TaskOptions(
        limit=flags["limit"],
        num_fewshot=flags["num_fewshot"],
        folder=flags["tasks_folder"],
        apply_chat_template=flags["apply_chat_template"],
        max_tokens=flags["max_tokens"],
    )
    return prepare_tasks(names, options)
