"""Texts about a run for its report: what was trained, on what, with which result."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_dpo.config.dpo_config import DPOConfig, get_settings
from mlx_dpo.config.setting import Setting
from mlx_dpo.losses.metrics import EVAL_PREFIX, METRICS
from mlx_dpo.reporting.metrics_text import NOISE, SAMPLE_METRICS, ZERO_MARGIN, format_final_metrics
from mlx_dpo.reporting.run_page import Finding, KeyFigure, RunDetails, SettingRow
from mlx_dpo.runs.folder import RunPaths
from mlx_dpo.runs.summary import describe_loss
from mlx_dpo.training.monitor.verdict import Verdict, describe_result
from mlx_dpo.types import MetricsRow
from mlx_dpo.units import format_duration, format_items

# Settings that are listed first where they have their defaults.
MAIN_SETTINGS = (
    "loss_type",
    "beta",
    "learning_rate",
    "epochs",
    "batch_size",
    "max_length",
    "lora_r",
)
# What it means that a setting without a default is not set; `none` for the others.
UNSET = {
    "max_steps": "no limit: `epochs` decides",
    "warmup_steps": "`warmup_ratio` decides",
}
# Columns of the table of evaluations: label, key of a metrics row, and number format.
EVALUATION_COLUMNS = (
    ("loss", "eval_loss", ".4f"),
    ("token accuracy", "eval_mean_token_accuracy", ".1%"),
    ("margin", "eval_rewards/margins", "+.3f"),
    ("accuracy", "eval_rewards/accuracies", ".1%"),
    ("log-prob of chosen", "eval_logps/chosen", ".2f"),
    ("log-prob of rejected", "eval_logps/rejected", ".2f"),
    *((label, key, form) for label, key, form in SAMPLE_METRICS if "kl" in key or "repet" in key),
)


class LoggedRun:
    """The run record and the metrics of a run, which may be unfinished or not begun.

    Args:
        paths: Paths of the run's files.
        record: Content of `run.json`.
        rows: Lines of `metrics.jsonl`.
    """

    def __init__(
        self, paths: RunPaths, record: Mapping[str, Any], rows: Iterable[MetricsRow]
    ) -> None:
        self.paths, self.record = paths, record
        self.training_rows: list[MetricsRow] = []  # of optimizer steps
        self.evaluations: list[MetricsRow] = []  # on held-out pairs
        self.seconds = 0.0  # that the optimizer steps took, without evaluations
        for row in rows:
            self.append(row)

    def append(self, row: MetricsRow) -> None:
        """Add the next metrics row of a run in training."""
        if "eval_loss" in row:
            self.evaluations.append(row)
            return
        earlier = self.training_rows[-1] if self.training_rows else None
        self.seconds += step_seconds(earlier, row)
        self.training_rows.append(row)

    @property
    def rows(self) -> list[MetricsRow]:
        """All metrics rows, in the order of steps."""
        return sorted([*self.training_rows, *self.evaluations], key=lambda row: row["step"])

    @cached_property
    def config(self) -> DPOConfig:
        """Settings of the run."""
        return DPOConfig.from_dict(self.record["settings"])

    @property
    def model_name(self) -> str:
        """Hub id of the base model, or the name of its folder without the path."""
        model: str = self.record["settings"]["model"]
        return Path(model).name if self.record["model_folder"] else model

    @property
    def data_name(self) -> str:
        """Names of the data sets, without the folders in which their files are."""
        sources = [str(report.get("source", "")) for report in self.record["pairs"]]
        names = [Path(source).name or source for source in sources]
        return " + ".join("standard input" if name == "-" else name for name in names)

    @property
    def step(self) -> int:
        """Number of optimizer steps so far."""
        last = [rows[-1]["step"] for rows in (self.training_rows, self.evaluations) if rows]
        return int(max(last, default=0))

    @property
    def planned_steps(self) -> int:
        """Number of optimizer steps that the run will have, or had if it stopped early."""
        return int(self.record.get("stopped_early_at") or self.record.get("steps") or self.step)

    @property
    def evaluation(self) -> MetricsRow:
        """Metrics of the final evaluation, else of the latest one; empty if there is none."""
        return dict(self.record["evaluation"] or (self.evaluations or [{}])[-1])

    @property
    def is_finished(self) -> bool:
        """Whether the final adapters are written."""
        return bool(self.record["state"] == "finished")

    @property
    def verdict(self) -> Verdict | None:
        """Verdict on the trained policy; None if nothing is wrong or the run is not finished."""
        return Verdict.from_record(self.record)


def step_seconds(earlier: MetricsRow | None, row: MetricsRow) -> float:
    """Return the seconds of an optimizer step, from its tokens and its speed; 0 if unknown.

    Args:
        earlier: Metrics row of the step before.
        row: Metrics row of the step.
    """
    if not row.get("tokens_per_second") or (earlier is None and row["step"] != 1):
        return 0.0
    before = 0 if earlier is None else earlier.get("num_tokens", 0)
    return (row.get("num_tokens", 0) - before) / row["tokens_per_second"]


def describe_run(run: LoggedRun, name: str, differing: Mapping[str, str]) -> RunDetails:
    """Return a run's texts for the report.

    Args:
        name: Name of the run on the page.
        differing: The settings in which the runs of the report differ.
    """
    evaluation, verdict = run.evaluation, run.verdict
    is_noise = verdict is not None and verdict.is_noise
    changed, unchanged = describe_settings(run)
    return RunDetails(
        name=name,
        state="finished" if run.is_finished else "not finished",
        summary=f"{run.model_name} · {run.data_name} · {describe_loss(run.config)}",
        figures=_key_figures(run, evaluation, is_noise=is_noise),
        result=_describe_result(run, evaluation),
        warnings=list(run.record.get("warnings", [])),
        facts=_describe_facts(run),
        changed=changed,
        unchanged=unchanged,
        settings=differing,
        metrics={
            "step": f"{run.step:,}",
            "eval step": f"{evaluation['step']:,}" if "step" in evaluation else "-",
            **format_final_metrics(evaluation, is_noise=is_noise),
        },
        evaluations=_evaluation_table(run.evaluations),
    )


def _describe_facts(run: LoggedRun) -> list[tuple[str, str]]:
    record, config = run.record, run.config
    versions = ", ".join(f"{package} {number}" for package, number in record["versions"].items())
    counts = "{train:,} trained on, {valid:,} held out".format(**record["counts"])
    return [
        ("model", run.model_name),
        (config.unit, f"{counts} ({run.data_name})"),
        ("loss", describe_loss(config)),
        ("steps", _describe_progress(run)),
        *([("adapter", record["adapter"])] if record.get("adapter") else []),
        ("versions", versions),
    ]


def _describe_progress(run: LoggedRun) -> str:
    """Return the number of steps, whether training stopped early, and the best checkpoint."""
    total, stopped_at = run.record["steps"], run.record.get("stopped_early_at")
    text = f"{stopped_at or run.step:,} of {total:,}"
    if not run.is_finished:
        text += ", not finished"
    if stopped_at:
        text += ", then stopped early"
    if best := run.record.get("best_checkpoint"):
        values = ", ".join(f"{name} {best[name]:.4f}" for name in best if name != "step")
        text += f"; the final adapters are those of step {best['step']:,} ({values})"
    return text


def _describe_result(run: LoggedRun, evaluation: MetricsRow) -> Finding | None:
    """Return the result of a run; None if it is not finished."""
    if not run.is_finished:
        return None
    verdict, margin = run.verdict, evaluation.get("eval_rewards/margins", 0.0)
    level = "good" if margin > 0 or _has_lower_loss(run, evaluation) else "unclear"
    if verdict is not None:
        level = "bad" if verdict.is_worse else "unclear"
    pairs = format_items(run.record["counts"]["valid"], f"held-out {run.config.unit}")
    before = run.record.get("before")
    return Finding(level, describe_result(verdict, evaluation or None, pairs, before))


def _has_lower_loss(run: LoggedRun, evaluation: MetricsRow) -> bool:
    """Return whether instruction tuning has reduced the loss on held-out rows."""
    before = (run.record.get("before") or {}).get("eval_loss")
    return run.config.supervised and before is not None and evaluation["eval_loss"] < before


def _key_figures(run: LoggedRun, evaluation: MetricsRow, *, is_noise: bool) -> list[KeyFigure]:
    """Return the figures of the page's head, each with its value before training where known."""
    rows = run.training_rows
    figures = [figure for figure in _evaluation_figures(run, evaluation, is_noise) if figure]
    if rows:
        tokens, seconds = rows[-1].get("num_tokens", 0), run.seconds
        figures.append(KeyFigure("tokens", None, f"{tokens:,}", f"in {run.step:,} steps"))
        speed = f"{tokens / seconds:,.0f} tokens per second" if seconds else ""
        figures.append(KeyFigure("training time", None, format_duration(seconds), speed))
    return figures


def _evaluation_figures(
    run: LoggedRun, evaluation: MetricsRow, is_noise: bool
) -> list[KeyFigure | None]:
    before = dict(run.record.get("before") or {})
    if abs(before.get("eval_rewards/margins", 0.0)) < ZERO_MARGIN:
        before.pop("eval_rewards/accuracies", None)  # there is no preference yet
    pairs = format_items(run.record["counts"]["valid"], f"held-out {run.config.unit}")
    held_out = f"held out, step {evaluation.get('step', 0):,}"
    figures = [
        _figure(evaluation, before, "mean_token_accuracy", ".1%", "of the tokens of " + pairs),
        _figure(evaluation, before, "accuracies", ".1%", f"of {pairs}; chance: 50%"),
        _figure(evaluation, before, "margins", "+.3f", held_out),
        _figure(evaluation, before, "loss", ".3f", held_out),
        _figure(evaluation, before, "chosen_logps", ".2f", "held out, per completion"),
    ]
    if is_noise and figures[1] is not None:
        figures[1] = figures[1]._replace(after=NOISE)
    return figures


def _figure(
    evaluation: MetricsRow, before: MetricsRow, field: str, form: str, note: str
) -> KeyFigure | None:
    """Return the figure of a metric, given its field in `METRICS`; None if it was not measured."""
    metric = METRICS[field]
    key = EVAL_PREFIX + metric.name
    if key not in evaluation:
        return None
    start = format(before[key], form.replace("+", "")) if key in before else None
    return KeyFigure(metric.label, start, format(evaluation[key], form), note)


def _evaluation_table(evaluations: Sequence[MetricsRow]) -> list[dict[str, str]]:
    """Return the evaluations as rows of texts by column label."""
    columns = [c for c in EVALUATION_COLUMNS if any(c[1] in row for row in evaluations)]
    return [
        {
            "step": f"{row['step']:,}",
            **{label: format(row[k], form) if k in row else "-" for label, k, form in columns},
        }
        for row in evaluations
    ]


def describe_settings(run: LoggedRun) -> tuple[list[SettingRow], list[SettingRow]]:
    """Return the changed or chosen settings, and the others with the main ones first.

    Private settings are named without their values; paths and settings that do not change the
    result are left out.
    """
    config = run.config
    private = set(config.list_private_settings())
    public = config.get_public_settings()
    automatic = run.record.get("automatic_settings") or {}
    reasons = run.record.get("chosen_settings") or {}
    changed, unchanged = [], []
    for name, setting in get_settings().items():
        default = describe_value(name, setting, setting.default)
        if name in private:
            changed.append(SettingRow(name, "(not shown)", f"default: {default}"))
        elif name in public and (value := describe_value(name, setting, public[name])) != default:
            note = f"default: {default}"
            if name in reasons:
                note = f"chosen: {reasons[name]}"
            elif name in automatic and run.record["settings"].get(name) == automatic[name]:
                note = "chosen for this machine"
            changed.append(SettingRow(name, value, note))
        elif setting.changes_result and not setting.is_path:
            unchanged.append(SettingRow(name, default, ""))
    order = {name: number for number, name in enumerate(MAIN_SETTINGS)}
    unchanged.sort(key=lambda row: order.get(row.name, len(order)))
    return changed, unchanged


def describe_value(name: str, setting: Setting, value: Any) -> str:
    """Return the value of a setting as text; for a value that is not set, what then holds."""
    if value is None or value in ((), [], ""):
        return setting.default_text.partition(";")[0] or UNSET.get(name, "none")
    if isinstance(value, bool):
        return "yes" if value else "no"
    values = value if isinstance(value, list | tuple) else [value]
    return " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)


def differing_settings(runs: Sequence[LoggedRun]) -> list[dict[str, str]]:
    """Return, for each run, the model and the public settings in which the runs differ."""
    columns = {"model": [run.model_name for run in runs]}
    configs, known = [run.config for run in runs], get_settings()
    for name in dict.fromkeys(name for config in configs for name in config.get_public_settings()):
        own = [getattr(config, name) for config in configs]
        if name == "beta":  # its default depends on the loss, which is known here
            own = [config.common_beta for config in configs]
        columns[name] = [describe_value(name, known[name], value) for value in own]
    differing = {name: values for name, values in columns.items() if len(set(values)) > 1}
    return [{name: values[i] for name, values in differing.items()} for i in range(len(runs))]
