"""Reports of runs: an HTML page and a plot, from the files in the run folders."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.errors import ConfigError, RunError, reason
from mlx_dpo.io.atomic import write_file
from mlx_dpo.phases import phase
from mlx_dpo.reporting import plots
from mlx_dpo.reporting.console import format_final_metrics
from mlx_dpo.reporting.curves import make_charts
from mlx_dpo.reporting.metrics_log import read_metrics
from mlx_dpo.reporting.run_page import RunDetails, render_run_page
from mlx_dpo.runs.folder import CURVES, RunPaths, find_run
from mlx_dpo.runs.summary import describe_loss
from mlx_dpo.training.monitor.verdict import Verdict
from mlx_dpo.types import MetricsRow

PAGE, PLOT = "report.html", "report.png"


class LoggedRun(NamedTuple):
    """The run record and the metrics of a run, which may be unfinished."""

    paths: RunPaths
    record: Mapping[str, Any]  # content of `run.json`
    rows: Sequence[MetricsRow]  # lines of `metrics.jsonl`, at least one

    @property
    def config(self) -> DPOConfig:
        """Settings of the run."""
        return DPOConfig.from_dict(self.record["settings"])

    @property
    def model_name(self) -> str:
        """Hub id of the base model, or the name of its folder without the path."""
        model: str = self.record["settings"]["model"]
        return Path(model).name if self.record["model_folder"] else model

    @property
    def step(self) -> int:
        """Number of optimizer steps so far."""
        return int(self.rows[-1]["step"])

    @property
    def evaluation(self) -> MetricsRow:
        """Metrics of the final evaluation, else of the latest one; empty if there is none."""
        evaluations = [row for row in self.rows if "eval_loss" in row]
        return dict(self.record["evaluation"] or (evaluations[-1] if evaluations else {}))


def read_logged_run(folder: str) -> LoggedRun:
    """Read the run record and the metrics of a run, which may be unfinished.

    Raises:
        RunError: the folder is not a run folder, or no optimizer step was taken yet.
    """
    paths, record = find_run(folder)
    rows = read_metrics(paths.metrics)
    if not rows:
        raise RunError(f"{folder}: no step has been taken yet, so there is nothing to plot")
    return LoggedRun(paths, record, rows)


def write_report(
    folders: Sequence[str], output: str | None, x_axis: str
) -> tuple[list[RunDetails], list[Path]]:
    """Write the page and the plot of one run, or of several runs with overlaid curves.

    Args:
        folders: Run folders.
        output: Folder of the two files; by default the run folder, if there is only one.
        x_axis: A key of `curves.X_AXES`.

    Returns:
        The details of each run, and the paths of the written files.

    Raises:
        RunError: a folder is not a run folder, or a file cannot be written.
        ConfigError: there are several runs and no `output`, or a run is named twice.
    """
    if output is None and len(folders) > 1:
        raise ConfigError("`--output` is missing: the folder for a report of several runs")
    runs = [read_logged_run(folder) for folder in folders]
    names = shortest_names([run.paths.folder for run in runs])
    settings = _differing_settings(runs)
    details = [_describe_run(*run) for run in zip(runs, names, settings, strict=True)]
    folder = Path(output).expanduser() if output else runs[0].paths.folder
    with phase("Plotting"):
        charts = make_charts([run.rows for run in runs], x_axis=x_axis)
        files = {
            PAGE: render_run_page(details, charts, x_axis).encode(),
            PLOT: plots.charts_png(charts, names, x_axis),
        }
    return details, [_write(folder / name, content) for name, content in files.items()]


def write_curves(folder: Path) -> bool:
    """Write the model card's plot to a run folder; return False if there are no metrics to plot."""
    charts = make_charts([read_metrics(RunPaths(folder).metrics)], for_model_card=True)
    if charts:
        _write(folder / CURVES, plots.charts_png(charts, [folder.name], "step"))
    return bool(charts)


def shortest_names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that tell the folders apart, in printable form.

    Raises:
        ConfigError: a folder is named twice.
    """
    paths = [folder.resolve().parts for folder in folders]
    if len(set(paths)) < len(paths):
        repeated = next(folder for folder in folders if paths.count(folder.resolve().parts) > 1)
        raise ConfigError(f"{repeated}: is named twice; name it once")
    deepest = max(len(parts) for parts in paths)
    suffixes = ([os.path.join(*parts[-n:]) for parts in paths] for n in range(1, deepest + 1))
    unique = next(names for names in suffixes if len(set(names)) == len(names))
    return ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in name) for name in unique]


def _describe_run(run: LoggedRun, name: str, settings: Mapping[str, str]) -> RunDetails:
    """Return a run's texts for the report; `settings` are those in which its runs differ."""
    record, config, evaluation = run.record, run.config, run.evaluation
    verdict = Verdict.from_record(record)
    versions = ", ".join(f"{package} {number}" for package, number in record["versions"].items())
    facts = [
        ("steps", _describe_progress(run)),
        ("model", run.model_name),
        ("loss", describe_loss(config)),
        (config.unit, "{train:,} trained on, {valid:,} held out".format(**record["counts"])),
        ("settings", _describe_settings(config) or "all have their default"),
        *([("adapter", record["adapter"])] if "adapter" in record else []),
        ("versions", versions),
    ]
    metrics = {
        "step": f"{run.step:,}",
        "evaluated at step": f"{evaluation['step']:,}" if "step" in evaluation else "-",
        **format_final_metrics(evaluation, is_noise=verdict is not None and verdict.is_noise),
    }
    findings = [*record.get("warnings", []), *([] if verdict is None else [verdict.text])]
    return RunDetails(name, facts, settings, metrics, findings)


def _describe_progress(run: LoggedRun) -> str:
    """Return the number of steps, whether training stopped early, and the best checkpoint."""
    total, stopped_at = run.record["steps"], run.record.get("stopped_early_at")
    text = f"{stopped_at or run.step:,} of {total:,}"
    if run.record["state"] != "finished":
        text += ", not finished"
    if stopped_at:
        text += ", then stopped early"
    if best := run.record.get("best_checkpoint"):
        values = ", ".join(f"{name} {best[name]:.4f}" for name in best if name != "step")
        text += f"; the final adapters are those of step {best['step']:,} ({values})"
    return text


def _describe_settings(config: DPOConfig) -> str:
    """Return the changed settings as text, with the values of the public ones only."""
    public = [
        f"{name} {_format_value(value)}" for name, value in config.get_public_settings().items()
    ]
    private = [f"{name} (not shown)" for name in config.list_private_settings()]
    return ", ".join([*public, *private])


def _format_value(value: Any) -> str:
    if value is None or value == ():
        return "default"
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _differing_settings(runs: Sequence[LoggedRun]) -> list[dict[str, str]]:
    """Return, for each run, the model and the public settings in which the runs differ."""
    columns = {"model": [run.model_name for run in runs]}
    configs = [run.config for run in runs]
    for name in dict.fromkeys(name for config in configs for name in config.get_public_settings()):
        columns[name] = [_format_value(getattr(config, name)) for config in configs]
    differing = {name: values for name, values in columns.items() if len(set(values)) > 1}
    return [{name: values[i] for name, values in differing.items()} for i in range(len(runs))]


def _write(path: Path, content: bytes) -> Path:
    """Write a file, creating its folder; return its path."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({reason(error)})") from error
    return path
