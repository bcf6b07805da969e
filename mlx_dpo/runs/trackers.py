"""Which programs a run tells of itself, and what: its rows, what was set, never a path."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.data.dataset import LENGTHS, column
from mlx_dpo.reporting import trackers as programs
from mlx_dpo.reporting.trackers.base import Announced, Row
from mlx_dpo.runs.folder import hub_model
from mlx_dpo.training.monitor import Facts, Monitor
from mlx_dpo.types import TokenizedPair

if TYPE_CHECKING:
    from mlx_dpo.runs.trainer import Run


def check_sinks(config: DPOConfig) -> None:
    """Ask for what is missing before anything is loaded.

    Raises:
        ConfigError: a library is not installed, or nobody is logged in.
    """
    for name in config.reports_to:
        programs.check(name)


def open_sinks(run: "Run", rows: Sequence[Row]) -> None:
    """Begin to tell them of a run, the rows that there are already first.

    Raises:
        ConfigError: one of them cannot be told, as its library says.
    """
    earlier = run.earlier["settings"].get("report_to", ()) if run.earlier else ()
    for name in run.config.reports_to:
        told = Announced(
            id=run.record["id"],
            name=name_there(run.config),
            project=run.config.project,
            folder=run.paths.folder,
            settings=_settings(run.record),
            before=run.start.step if name in earlier else 0,
        )
        run.sinks.open.append(programs.begin(name, told, run.sinks.lost))
    for row in rows:
        run.sinks.write(row)


def name_there(config: DPOConfig) -> str:
    """The name of a run in other programs."""
    return config.run_name or Path(config.output).resolve().name


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    shareable = DPOConfig.from_dict(record["settings"]).shareable()
    model = hub_model(record)
    return ({"model": model} if model else {}) | shareable


def make_monitor(config: DPOConfig, pairs: Sequence[TokenizedPair], *, total_steps: int) -> Monitor:
    """A monitor for a run on these pairs."""
    return Monitor(
        Facts(
            total_steps=total_steps,
            warmup_steps=config.warmup(total_steps),
            batch_size=min(config.batch_size, len(pairs)),
            beta=config.loss_beta,
            learning_rate=config.learning_rate,
            max_grad_norm=config.max_grad_norm,
            chosen_tokens=float(column(pairs, LENGTHS)[:, 1].mean()),
            referenced=config.rewarded == "log-ratio" and config.reference_model is None,
            from_start=config.reference_model is None and not config.sync_ref_model,
        )
    )
