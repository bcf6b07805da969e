"""Benchmark tasks of lm-eval on base and aligned model, on one set of weights.

lm-eval (EleutherAI's LM Evaluation Harness) is an extra of the package and imported here only, when
tasks are asked for. It prepares prompts and computes metrics; `lm_eval_model` computes
log-likelihoods and answers. Seeds and defaults are those of `mlx_lm.evaluate`, so that the numbers
are those of the fused model.
"""

import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from mlx_dpo.adapters.switch import AdapterState
from mlx_dpo.errors import ConfigError, DPOError, reason
from mlx_dpo.evaluation.measurements.measurement import Measure
from mlx_dpo.evaluation.measurements.paired_difference import paired_difference
from mlx_dpo.phases import phase
from mlx_dpo.saved_runs.open import SwitchableModel

STATES: tuple[AdapterState, ...] = ("base", "aligned")
SEED = 123  # of few-shot examples; the default of mlx_lm.evaluate
BOOTSTRAP_ITERATIONS = 1000  # for standard errors without a formula, such as those of perplexities
ROUNDING = 1e-9  # of a mean that lm-eval and we compute in different order


@dataclass(frozen=True)
class TaskOptions:
    """Options of benchmark tasks.

    Attributes:
        limit: number of documents per task, from the beginning; None for all.
        num_fewshot: number of examples in each prompt; None for that of the task.
        folder: folder with tasks of one's own, whose Python code lm-eval runs.
        apply_chat_template: whether prompts go through the chat template; None does what training
            did.
        max_tokens: limit of tokens per generated answer; None for that of the task.
    """

    limit: int | None = None
    num_fewshot: int | None = None
    folder: str | None = None
    apply_chat_template: bool | None = None
    max_tokens: int | None = None


@dataclass(frozen=True)
class TasksMeasurement:
    """Metrics of base and aligned model on benchmark tasks, with standard errors.

    Attributes:
        metrics: metrics by state and task; the standard error of `acc` is `acc_stderr`.
        differences: mean and 95 % interval of the paired differences, by task and metric.
        tasks: version, number of documents and of few-shot examples, by task.
    """

    subject: str
    settings: Mapping[str, Any]
    metrics: Mapping[AdapterState, Mapping[str, Mapping[str, float]]]
    differences: Mapping[str, Mapping[str, Mapping[str, Any]]]
    tasks: Mapping[str, Mapping[str, Any]]
    notes: tuple[str, ...]
    name: str = "tasks"

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics of both states, their differences, and facts about the tasks."""
        facts = {name: self.settings[name] for name in ("lm-eval", "apply_chat_template")}
        facts |= {"of": self.subject, "tasks": self.tasks, "difference": self.differences}
        return facts | {state: dict(metrics) for state, metrics in self.metrics.items()}


def prepare_tasks(names: Sequence[str], options: TaskOptions) -> Measure:
    """Load tasks and their data, and return what measures them.

    Raises:
        ConfigError: lm-eval is missing, a task is unknown, cannot be loaded, needs images, or runs
            code that a model wrote.
    """
    loaded = _load_tasks(names, options)
    notes = _set_fewshot(loaded["tasks"], options.num_fewshot)

    def measure(model: SwitchableModel) -> TasksMeasurement:
        return measure_tasks(model, loaded, names, options, notes)

    return measure


def measure_tasks(
    model: SwitchableModel,
    loaded: Mapping[str, Any],
    names: Sequence[str],
    options: TaskOptions,
    notes: Sequence[str] = (),
) -> TasksMeasurement:
    """Return the metrics of base and aligned model on loaded tasks.

    Raises:
        ConfigError: the code of a task fails, or the tokenizer has no chat template.
    """
    as_chat = _as_chat(model, options)
    results: dict[AdapterState, Mapping[str, Any]] = {}
    warnings: dict[str, int] = {}
    for state in STATES:
        with model.switch.activated(state):
            results[state], found = _evaluate(model, loaded, options, state, as_chat=as_chat)
        warnings |= found
    aligned = results["aligned"]
    settings = {
        "tasks": list(names),
        "limit": options.limit,
        "num_fewshot": options.num_fewshot,
        "apply_chat_template": as_chat,
        "max_tokens": options.max_tokens,
        "seed": SEED,
        "lm-eval": version("lm-eval"),
    }
    return TasksMeasurement(
        ", ".join(names),
        settings,
        {state: _metrics(result) for state, result in results.items()},
        _differences(results["base"], aligned),
        _facts(aligned),
        (*notes, *(f"{count:,} {text}" for text, count in warnings.items())),
    )


def _import_lm_eval(name: str) -> Any:
    """Return a module of lm-eval, which has no types.

    Raises:
        ConfigError: lm-eval is not installed, or cannot be imported.
    """
    try:
        return import_module(f"lm_eval.{name}")
    except ImportError as error:
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == "lm_eval"
        what = "is not installed" if is_missing else f"cannot be imported ({reason(error)})"
        raise ConfigError(f"`tasks`: lm-eval {what}; pip install 'mlx-dpo[tasks]'") from error


def _load_tasks(names: Sequence[str], options: TaskOptions) -> dict[str, Any]:
    """Return the tasks and groups that lm-eval loads, with their data.

    Raises:
        ConfigError: see `prepare_tasks`.
    """
    tasks_module = _import_lm_eval("tasks")
    if options.folder is not None and not Path(options.folder).expanduser().is_dir():
        raise ConfigError(f"{options.folder}: no such folder; name a folder with tasks")
    with phase("Loading tasks"), _quiet():
        manager = _find_tasks(tasks_module, names, options.folder)
        try:
            loaded: dict[str, Any] = manager.load(list(names))
        except Exception as error:  # a task's own code may raise anything
            cause = f"{type(error).__name__}: {reason(error)}"
            raise ConfigError(
                f"`tasks` {', '.join(names)}: cannot be loaded ({cause}); its data may need the "
                "network"
            ) from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(
                f"`tasks` {name}: runs code that the model writes, which is not supported here; "
                "leave it out"
            )
        if getattr(task, "MULTIMODAL", False):
            raise ConfigError(f"`tasks` {name}: needs images or audio; leave it out")
    return loaded


def _find_tasks(tasks_module: Any, names: Sequence[str], folder: str | None) -> Any:
    """Return a task manager that knows all tasks.

    Tasks in a folder of one's own alone are found without reading the 14,000 tasks of lm-eval.

    Raises:
        ConfigError: a name is unknown.
    """
    path = None if folder is None else str(Path(folder).expanduser())
    if path is not None:
        manager = tasks_module.TaskManager(include_path=path, include_defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager
    manager = tasks_module.TaskManager(include_path=path)
    known = list(manager.all_tasks)
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists all"
            raise ConfigError(f"`tasks` {name}: no such task; {hint}")
    return manager


def _set_fewshot(tasks: Mapping[str, Any], num_fewshot: int | None) -> tuple[str, ...]:
    """Set the number of examples of each task, as lm-eval's own command does; return notes."""
    fixed = []
    for name, task in tasks.items():
        default = task.get_config("num_fewshot")
        if num_fewshot is None:
            task.set_config(key="num_fewshot", value=default or 0)
        elif default == 0 and num_fewshot != 0:
            fixed.append(name)
        else:
            task.set_config(key="num_fewshot", value=num_fewshot)
    if not fixed:
        return ()
    return (f"--num-fewshot has no effect on {', '.join(fixed)}, defined without examples",)


def _as_chat(model: SwitchableModel, options: TaskOptions) -> bool:
    """Return whether prompts go through the chat template.

    Raises:
        ConfigError: the tokenizer has no chat template, and one is asked for.
    """
    has_template = bool(model.base.tokenizer.has_chat_template)
    if options.apply_chat_template is None:
        return has_template and not (model.run is not None and model.run.trained_on_text)
    if options.apply_chat_template and not has_template:
        raise ConfigError(
            f"{model.base.source}: its tokenizer has no chat template; leave out "
            "--apply-chat-template"
        )
    return options.apply_chat_template


def _evaluate(
    model: SwitchableModel,
    loaded: Mapping[str, Any],
    options: TaskOptions,
    state: AdapterState,
    *,
    as_chat: bool,
) -> tuple[Mapping[str, Any], Mapping[str, int]]:
    """Return lm-eval's results of the active model, and counted warnings.

    Raises:
        ConfigError: the code of a task fails.
    """
    evaluator = _import_lm_eval("evaluator")
    from mlx_dpo.evaluation.measurements.lm_eval_model import LmEvalModel

    thinking = bool(model.run is not None and model.run.config.thinking)
    lm_eval_model = LmEvalModel(
        model.base, as_chat=as_chat, thinking=thinking, max_tokens=options.max_tokens, label=state
    )
    random.seed(SEED)
    np.random.seed(SEED)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=SEED)
    try:
        with _quiet():
            results = evaluator.evaluate(
                lm_eval_model,
                loaded,
                limit=options.limit,
                bootstrap_iters=BOOTSTRAP_ITERATIONS,
                apply_chat_template=as_chat,
                fewshot_as_multiturn=False,
            )
    except DPOError:
        raise
    except Exception as error:  # a task's own code may raise anything
        if lm_eval_model.is_computing:
            raise
        names = ", ".join(loaded["tasks"])
        cause = f"{type(error).__name__}: {reason(error)}"
        raise ConfigError(f"`tasks` {names}: lm-eval failed ({cause}); leave it out") from error
    return results, lm_eval_model.warnings


@contextmanager
def _quiet() -> Iterator[None]:
    """Discard what lm-eval prints and logs, and keep its bootstrap in this process.

    It prints to stdout, where JSON goes, and shows progress bars of its own; a process pool would
    fork the process with the model.
    """
    logger, task_module = logging.getLogger("lm_eval"), _import_lm_eval("api.task")
    level, bar = logger.level, task_module.tqdm
    before = os.environ.get("DISABLE_MULTIPROC")
    logger.setLevel(logging.ERROR)
    task_module.tqdm = lambda items, **settings: items
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        logger.setLevel(level)
        task_module.tqdm = bar
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]


def _metrics(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the numbers of lm-eval's results, by task or group and metric."""
    return {
        task: {
            _metric_name(key): float(value)
            for key, value in entries.items()
            if "," in key and isinstance(value, int | float)
        }
        for task, entries in results["results"].items()
    }


def _metric_name(key: str) -> str:
    """Return a metric's name without the filter `none`: `acc,none` becomes `acc`."""
    return key.removesuffix(",none")


def _facts(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return version, number of documents and of few-shot examples of each task."""
    return {
        task: {
            "version": results["versions"].get(task),
            "num_fewshot": results["n-shot"].get(task),
            "documents": results["n-samples"].get(task, {}).get("effective"),
        }
        for task in results["results"]
    }


def _differences(
    base: Mapping[str, Any], aligned: Mapping[str, Any]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the paired differences of the metrics that are means over documents."""
    differences: dict[str, dict[str, dict[str, Any]]] = {}
    for task in aligned["samples"]:
        before, after = _values(base, task), _values(aligned, task)
        differences[task] = {
            _metric_name(key): paired_difference(before[key], after[key]).to_dict()
            for key in before.keys() & after.keys()
        }
    return {task: dict(sorted(found.items())) for task, found in differences.items() if found}


def _values(results: Mapping[str, Any], task: str) -> dict[str, list[float]]:
    """Return the values per document of each metric of a task that is their mean."""
    columns: dict[str, list[float]] = {}
    for sample in results["samples"][task]:
        for metric in sample["metrics"]:
            if isinstance(value := sample.get(metric), int | float):
                columns.setdefault(f"{metric},{sample['filter']}", []).append(float(value))
    entries = results["results"][task]
    return {
        key: values
        for key, values in columns.items()
        if isinstance(entries.get(key), int | float)
        and abs(fmean(values) - entries[key]) <= ROUNDING
    }
