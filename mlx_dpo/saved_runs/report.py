"""Reports of runs: an HTML page and a plot, from the files in the run folders."""

import os
from collections.abc import Sequence
from pathlib import Path

from mlx_dpo.errors import ConfigError, RunError, reason
from mlx_dpo.io.atomic import write_file
from mlx_dpo.phases import phase
from mlx_dpo.reporting import plots
from mlx_dpo.reporting.curves import make_charts
from mlx_dpo.reporting.evaluations.shown_result import ShownResult
from mlx_dpo.reporting.metrics_log import read_metrics
from mlx_dpo.reporting.run_page import RunDetails, render_run_page
from mlx_dpo.reporting.samples import read_samples
from mlx_dpo.runs.folder import CURVES, RunPaths
from mlx_dpo.runs.stages.find import find_run
from mlx_dpo.saved_runs.details import LoggedRun, describe_run, differing_settings
from mlx_dpo.saved_runs.open import open_run
from mlx_dpo.saved_runs.stored_evaluations import read_present_evaluations, show_evaluation

PAGE, PLOT = "report.html", "report.png"


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
    settings = differing_settings(runs)
    details = [
        describe_run(run, name, differing)._replace(
            samples=read_samples(run.paths.samples), results=read_shown_results(run.paths)
        )
        for run, name, differing in zip(runs, names, settings, strict=True)
    ]
    folder = Path(output).expanduser() if output else runs[0].paths.folder
    with phase("Plotting"):
        charts = make_charts(
            [run.rows for run in runs],
            x_axis=x_axis,
            total_steps=[run.planned_steps for run in runs],
        )
        files = {
            PAGE: render_run_page(details, charts, x_axis).encode(),
            PLOT: plots.charts_png(charts, names, x_axis),
        }
    return details, [_write(folder / name, content) for name, content in files.items()]


def read_shown_results(paths: RunPaths) -> list[ShownResult]:
    """Return what `mlx-dpo eval` stored on a run's newest adapter, as texts.

    Raises:
        DamagedFileError: the adapter or a stored result is damaged.
    """
    if not paths.evaluations.is_dir():
        return []
    run = open_run(str(paths.folder))
    shown = [show_evaluation(run, stored) for stored in read_present_evaluations(run)]
    return [result for result in shown if result is not None]


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


def _write(path: Path, content: bytes) -> Path:
    """Write a file, creating its folder; return its path."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({reason(error)})") from error
    return path
