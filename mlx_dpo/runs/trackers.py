"""Create the experiment trackers and the training monitor of a run from its settings."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.data.columns import LENGTHS, column
from mlx_dpo.runs.folder import hub_model_id
from mlx_dpo.trackers import check_tracker, open_tracker
from mlx_dpo.trackers.base import OpenTrackers, RunInfo
from mlx_dpo.training.monitor import Monitor
from mlx_dpo.training.monitor.metrics import MonitoredRun
from mlx_dpo.types import MetricsRow, TokenizedPair


def check_trackers(config: DPOConfig) -> None:
    """Raise `ConfigError` if a tracker's library is missing or the user is not logged in.

    Call this function before anything is loaded, so that the run fails early.
    """
    for name in config.tracker_names:
        check_tracker(name)


def open_trackers(
    opened: OpenTrackers,
    config: DPOConfig,
    record: Mapping[str, Any],
    rows: Sequence[MetricsRow],
    *,
    step: int,
    earlier: Mapping[str, Any] | None,
) -> None:
    """Open the experiment trackers of a run, and log the metrics rows of earlier processes.

    Args:
        opened: collection to which the trackers are added.
        config: settings of the run, which name the trackers.
        record: run record (content of `run.json`).
        rows: metrics rows that are in `metrics.jsonl` already.
        step: the step at which the run resumes.
        earlier: run record of earlier processes of the run.

    Raises:
        ConfigError: a tracker cannot be opened.
    """
    info = RunInfo(
        id=record["id"],
        name=run_name(config),
        project=config.project,
        folder=Path(config.output),
        settings=shared_settings(record),
        last_logged_step=step,
    )
    resumed = earlier["settings"].get("report_to", ()) if earlier else ()
    for name in config.tracker_names:
        known = info if name in resumed else replace(info, last_logged_step=0)
        opened.trackers.append(open_tracker(name, known, opened.warnings))
    for row in rows:
        opened.log(row)


def run_name(config: DPOConfig) -> str:
    """Return the name that trackers show: the setting `run_name`, or the name of the run folder."""
    return config.run_name or Path(config.output).resolve().name


def shared_settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run that may be sent to trackers.

    The result contains no paths. The model is included if it is on the Hub.

    Args:
        record: run record (content of `run.json`).
    """
    shareable = DPOConfig.from_dict(record["settings"]).get_public_settings()
    model = hub_model_id(record)
    return ({"model": model} if model else {}) | shareable


def make_monitor(config: DPOConfig, pairs: Sequence[TokenizedPair], *, total_steps: int) -> Monitor:
    """Create the training monitor of a run that trains on `pairs`."""
    return Monitor(monitored_run(config, pairs, total_steps=total_steps))


def monitored_run(
    config: DPOConfig, pairs: Sequence[TokenizedPair], *, total_steps: int
) -> MonitoredRun:
    """Return what the monitor needs to know of a run that trains on `pairs`."""
    lengths = column(pairs, LENGTHS)
    chosen, rejected = lengths[:, 1], lengths[:, 2]
    return MonitoredRun(
        total_steps=total_steps,
        warmup_steps=config.count_warmup_steps(total_steps),
        batch_size=min(config.batch_size, len(pairs)),
        beta=config.common_beta,
        learning_rate=config.peak_learning_rate,
        max_grad_norm=config.max_grad_norm,
        chosen_tokens=float(chosen.mean()),
        rejected_tokens=float(rejected.mean()),
        chosen_longer=float((chosen > rejected).mean() + (chosen == rejected).mean() / 2),
        referenced=config.reward_kind == "log-ratio" and config.reference_model is None,
        supervised=config.supervised,
        from_start=config.reference_model is None and not config.sync_ref_model,
    )
