"""The HTML page of iterative DPO: rounds as a table and as charts, settings, answers."""

from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlx_dpo.collect.iterative.folder import IterativeSettings
from mlx_dpo.collect.iterative.report import (
    ANSWERS_PER_PAGE,
    LEGEND,
    PAIRS,
    Evaluation,
    round_warnings,
    summary_table,
)
from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.reporting import plots
from mlx_dpo.reporting.curves import Chart, Curve, Line
from mlx_dpo.reporting.html import render_page
from mlx_dpo.reporting.plots import DARK, LIGHT
from mlx_dpo.training.monitor.samples import KL, REPETITION

ANSWER_NAMES = {"base": "base", "before": "previous round", "now": "this round"}


class _Round(NamedTuple):
    """A round on the page: some of its answers to held-out prompts."""

    name: str
    columns: Sequence[str]  # headings of the answers
    answers: Sequence[tuple[str, Sequence[str]]]  # prompt, and an answer per column


def render_loop_page(
    config: DPOConfig, settings: IterativeSettings, judge: str, rounds: Sequence[Evaluation]
) -> str:
    """Return the page of all evaluated rounds as HTML.

    Args:
        config: settings of the training in each round.
        settings: settings of the loop.
        judge: name of the reward function or of the judge model.
        rounds: content of `evaluation.json` of each round, the base's first.
    """
    done = len(rounds) - 1
    return render_page(
        "loop.html",
        title=f"Iterative DPO of {_model_name(config)}",
        light=LIGHT,
        dark=DARK,
        state=f"{done} of {settings.rounds} round{'s' * (settings.rounds != 1)}, judged by {judge}",
        figures=summary_table(rounds),
        rounds=[_describe_round(evaluation) for evaluation in rounds],
        charts=[(chart, *_draw(chart)) for chart in make_round_charts(rounds)],
        warnings=[text for evaluation in rounds for text in round_warnings(evaluation)],
        legend=LEGEND,
        facts=list(_facts(config, settings, judge)),
    )


def make_round_charts(rounds: Sequence[Evaluation]) -> list[Chart]:
    """Return the charts over rounds: win rate, held-out reward, margin, length, KL and pairs.

    A chart without values is left out.
    """
    charts = (
        _chart(rounds, "Win rate against base", "share", _win_rate, baseline=0.5),
        _chart(rounds, "Held-out reward", "", lambda e: e.get("mean_reward")),
        _chart(rounds, "Margin", "nats", _margin, baseline=0.0),
        _chart(rounds, "Answer length", "characters", lambda e: e["mean_characters"], zero=True),
        _chart(rounds, "KL from base", "nats per token", lambda e: _health(e, KL), baseline=0.0),
        _chart(rounds, "4-gram repetition", "share", lambda e: _health(e, REPETITION), zero=True),
        _chart(rounds, "Judged pairs", "pairs", _pairs, zero=True),
    )
    return [chart for chart in charts if chart.lines]


def _chart(
    rounds: Sequence[Evaluation],
    title: str,
    unit: str,
    value: Any,
    *,
    baseline: float | None = None,
    zero: bool = False,
) -> Chart:
    """Return the chart of `value`, a function of an evaluation, over the rounds that have it."""
    points = [(e["round"], v) for e in rounds if (v := value(e)) is not None]
    x, y = [float(number) for number, _ in points], [float(v) for _, v in points]
    lines = [Line(0, "", True, x, y, y)] if points else []
    curve = Curve(title, unit, "", {}, baseline, starts_at_zero=zero)
    return Chart(curve, lines)


def _win_rate(evaluation: Evaluation) -> float | None:
    return (evaluation.get("against_base") or {}).get("win_rate")


def _margin(evaluation: Evaluation) -> float | None:
    return (evaluation.get("held_out_pairs") or {}).get("eval_rewards/margins")


def _pairs(evaluation: Evaluation) -> float | None:
    return (evaluation.get("collected") or {}).get(PAIRS)


def _health(evaluation: Evaluation, name: str) -> float | None:
    return (evaluation.get("health") or {}).get(name)


def _draw(chart: Chart) -> tuple[str, str, str]:
    """Return a chart as data URIs for the light and the dark theme, with alternative text."""
    light, dark = (
        f"data:image/svg+xml;base64,{b64encode(plots.chart_svg(chart, 1, 'round', t)).decode()}"
        for t in (LIGHT, DARK)
    )
    [line] = chart.lines
    return light, dark, f"{chart.curve.title}: from {line.y[0]:.4g} to {line.y[-1]:.4g}"


def _describe_round(evaluation: Evaluation) -> _Round:
    shown = evaluation["answers"][:ANSWERS_PER_PAGE]
    names = [name for name in ANSWER_NAMES if name in shown[0]]
    if evaluation["round"] == 1:  # the round before is the base
        names = [name for name in names if name != "before"]
    answers = [
        (
            " / ".join(str(turn["content"]) for turn in row["prompt"]),
            [row[name].strip() or "(empty)" for name in names],
        )
        for row in shown
    ]
    number = evaluation["round"]
    columns = [ANSWER_NAMES[name] if number else "base" for name in names]
    return _Round(f"Round {number}" if number else "Base", columns, answers)


def _facts(config: DPOConfig, settings: IterativeSettings, judge: str) -> Iterator[tuple[str, str]]:
    """Yield name and text of each setting; paths and private settings are left out."""
    yield "model", _model_name(config)
    yield "judge", judge
    if settings.principles is None:
        yield "answers per prompt", str(settings.answers)
    else:
        yield "revisions by principles", str(settings.revisions or 1)
    per_round = settings.prompts_per_round
    yield "prompts per round", "all" if per_round is None else f"{per_round:,}"
    yield "reference of later rounds", settings.reference
    yield "temperature", f"{settings.sampling.temperature:g}"
    yield "tokens per answer", f"up to {settings.sampling.max_tokens:,}"
    yield "training", _format_settings(config.get_public_settings()) or "default settings"


def _format_settings(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in values.items()
    )


def _model_name(config: DPOConfig) -> str:
    """Return the Hub id of the base model, or the name of its folder without the path."""
    folder = Path(config.model).expanduser()
    return folder.resolve().name if folder.is_dir() else config.model
