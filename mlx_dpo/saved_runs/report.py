"""Reports of runs: an HTML page and a plot, from the files in their folders."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.errors import ConfigError, RunError, reason
from mlx_dpo.io.atomic import write_file
from mlx_dpo.reporting import plots
from mlx_dpo.reporting.console import format_final_metrics
from mlx_dpo.reporting.curves import make_charts
from mlx_dpo.reporting.metrics_log import read_metrics
from mlx_dpo.reporting.run_page import RunDetails, render_run_page
from mlx_dpo.runs.folder import CURVES, RunPaths, find_run
from mlx_dpo.runs.summary import describe_loss
from mlx_dpo.types import MetricsRow

PAGE, PICTURE = "report.html", "report.png"


class LoggedRun(NamedTuple):
    """Record and metrics of a run, finished or not."""

    paths: RunPaths
    record: dict[str, Any]
    rows: list[MetricsRow]

    @property
    def step(self) -> int:
        """Last optimizer step."""
        return int(self.rows[-1]["step"])

    @property
    def evaluation(self) -> MetricsRow:
        """Evaluation of the final adapters, or else the last evaluation, if there is one."""
        judged = [row for row in self.rows if "eval_loss" in row]
        return dict(self.record["evaluation"] or (judged[-1] if judged else {}))


def read_logged_run(folder: str) -> LoggedRun:
    """Read record and metrics of a run, finished or not.

    Raises:
        RunError: it is no run, or no step was taken yet.
    """
    paths, record = find_run(folder)
    rows = read_metrics(paths.metrics)
    if not rows:
        raise RunError(f"{folder}: no step was taken yet; there is nothing to draw")
    return LoggedRun(paths, record, rows)


def write_report(
    folders: Sequence[str], output: str | None, along: str
) -> tuple[list[RunDetails], list[Path]]:
    """Write the page and the picture of one run, or of several overlaid.

    Args:
        output: folder for both; that of the run if there is only one.
        along: what x is, a key of `curves.X_AXES`.

    Raises:
        RunError: a folder is no run, or nothing can be written.
        ConfigError: several runs, and no folder named.
    """
    if output is None and len(folders) > 1:
        raise ConfigError("`--output` is missing: the folder for a report of several runs")
    runs = [read_logged_run(folder) for folder in folders]
    names = shortest_names([run.paths.folder for run in runs])
    details = _add_differing_settings(
        [_run_section(run, name) for run, name in zip(runs, names, strict=True)], runs
    )
    drawn = make_charts([run.rows for run in runs], x_axis=along)
    folder = Path(output).expanduser() if output else runs[0].paths.folder
    files = {
        PAGE: render_run_page(details, drawn, along).encode(),
        PICTURE: plots.charts_png(drawn, names, along),
    }
    return details, [_write(folder / name, content) for name, content in files.items()]


def write_curves(folder: Path) -> bool:
    """Write the plot for the model card to a run folder; return False without metrics."""
    drawn = make_charts([read_metrics(RunPaths(folder).metrics)], for_model_card=True)
    if drawn:
        _write(folder / CURVES, plots.charts_png(drawn, [folder.name], "step"))
    return bool(drawn)


def shortest_names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest path suffixes that distinguish the folders, printable.

    Raises:
        ConfigError: one is named twice.
    """
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        twice = next(folder for folder in folders if parts.count(folder.resolve().parts) > 1)
        raise ConfigError(f"{twice}: is named twice")
    deepest = max(len(each) for each in parts)
    tails = ([os.path.join(*each[-n:]) for each in parts] for n in range(1, deepest + 1))
    found = next(names for names in tails if len(set(names)) == len(names))
    return ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in name) for name in found]


def _run_section(run: LoggedRun, name: str) -> RunDetails:
    record, settings = run.record, run.record["settings"]
    config = DPOConfig.from_dict(settings)
    versions = ", ".join(f"{what} {number}" for what, number in record["versions"].items())
    model = Path(config.model).name if record["model_folder"] else config.model
    facts = [
        ("steps", _describe_progress(run)),
        ("model", model),
        ("loss", describe_loss(config)),
        (config.unit, "{train:,} trained on, {valid:,} held out".format(**record["counts"])),
        ("settings", _describe_settings(config) or "all as they are by default"),
        *([("adapter", record["adapter"])] if "adapter" in record else []),
        ("versions", versions),
    ]
    judged = run.evaluation
    figures = {
        "step": f"{run.step:,}",
        "judged at": f"{judged['step']:,}" if "step" in judged else "-",
        **format_final_metrics(judged),
    }
    return RunDetails(name, facts, figures, record.get("warnings", []))


def _describe_progress(run: LoggedRun) -> str:
    steps, early = run.record["steps"], run.record.get("stopped_early_at")
    state = "" if run.record["state"] == "finished" else ", not finished"
    text = f"{early or run.step:,} of {steps:,}{state}" + ", then stopped early" * bool(early)
    if best := run.record.get("best_checkpoint"):
        values = ", ".join(f"{name} {best[name]:.4f}" for name in best if name != "step")
        text += f"; the adapters of step {best['step']:,} were kept ({values})"
    return text


def _describe_settings(config: DPOConfig) -> str:
    public = config.get_public_settings()
    shown = [f"{name} {_format_value(value)}" for name, value in public.items()]
    hidden = [f"{name} (not shown)" for name in config.list_private_settings()]
    return ", ".join([*shown, *hidden])


def _format_value(value: Any) -> str:
    if value is None or value == ():
        return "default"
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _add_differing_settings(
    details: Sequence[RunDetails], runs: Sequence[LoggedRun]
) -> list[RunDetails]:
    """Add the model and the settings in which the runs differ to their results."""
    configs = [DPOConfig.from_dict(run.record["settings"]) for run in runs]
    set_by = [config.get_public_settings() for config in configs]
    names = dict.fromkeys(name for settings in set_by for name in settings)
    differing = [n for n in names if len({_format_value(getattr(c, n)) for c in configs}) > 1]
    models = [dict(run_details.facts)["model"] for run_details in details]
    return [
        run_details._replace(
            cells={
                **({"model": model} if len(set(models)) > 1 else {}),
                **{n: _format_value(getattr(c, n)) for n in differing},
                **run_details.cells,
            }
        )
        for run_details, model, c in zip(details, models, configs, strict=True)
    ]


def _write(path: Path, content: bytes) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({reason(error)})") from error
    return path
