"""Markdown pages about iterative DPO: a summary with one line per round, and a page per round."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_dpo.reporting.markdown import escape_markdown
from mlx_dpo.training.monitor.samples import CLIPPED, KL, REPETITION

Evaluation = Mapping[str, Any]  # the content of a round's `evaluation.json`
PAIRS = "pairs"  # key of the number of pairs among the outcomes of a collection
ANSWERS_PER_PAGE = 8
WIN_RATE = "win rate against base (95 %)"
HEADINGS = (
    "round",
    "pairs",
    "no pair",
    "held-out reward",
    WIN_RATE,
    "length-controlled",
    "win rate against previous round",
    "characters",
    "KL from base (nats per token)",
    "4-gram repetition",
    "answers cut",
)
LEGEND = (
    "Win rate: the share of held-out prompts on which this round's answer is preferred; a tie is "
    "half a win. The interval is Wilson's. Length-controlled: the win rate at equal length by a "
    "logistic regression on the difference in length, as in AlpacaEval 2 (arXiv:2404.04475). "
    "KL: mean log-ratio to the base of the tokens that the policy sampled. Repetition: share of "
    "4-grams that repeat an earlier one. Cut: at the length limit. If these run away while the "
    "reward rises, the policy exploits the reward."
)


def summary_page(rounds: Sequence[Evaluation], judge: str) -> str:
    """Return the Markdown page with a table of all evaluated rounds."""
    lines = ["# Rounds", "", f"Judged by {judge}.", "", _table_row(HEADINGS)]
    lines.append(_table_row(["--:"] * len(HEADINGS)))
    lines += [_table_row(round_cells(evaluation)) for evaluation in rounds]
    warnings = [f"* {text}" for evaluation in rounds for text in round_warnings(evaluation)]
    return "\n".join([*lines, *([""] if warnings else []), *warnings, "", LEGEND, ""])


def summary_table(rounds: Sequence[Evaluation]) -> list[list[str]]:
    """Return the results of all rounds: a row per figure, its name and a cell per round.

    A figure that no round has is left out.
    """
    columns = [round_cells(evaluation) for evaluation in rounds]
    table = [list(row) for row in zip(HEADINGS, *columns, strict=True)]
    return [row for whole in table for row in _split_interval(whole) if any(row[1:])]


def summary_lines(rounds: Sequence[Evaluation]) -> list[str]:
    """Return the results of all rounds as lines of aligned text."""
    rows = summary_table(rounds)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def _split_interval(row: list[str]) -> list[list[str]]:
    """Return a row of the table, with the interval of a win rate on a second row."""
    parts = [cell.removesuffix(")").partition(" (") for cell in row]
    if row[0] != WIN_RATE:
        return [row]
    rates = [rate for rate, _, _ in parts]
    intervals = [interval for _, _, interval in parts]
    return [rates, ["  95 % interval", *intervals[1:]]]


def round_warnings(evaluation: Evaluation) -> list[str]:
    """Return what went wrong in a round: collapsed answers, and the verdict on its training."""
    number, warnings = evaluation["round"], []
    if collapse := evaluation.get("collapse"):
        warnings.append(
            f"round {number}: {collapse}: the policy probably exploits the reward; bound the "
            "reward, use a larger beta, a smaller learning_rate or fewer rounds, or "
            "--reference base"
        )
    if verdict := evaluation.get("training"):
        warnings.append(f"round {number}, training: {verdict}")
    return warnings


def round_cells(evaluation: Evaluation) -> list[str]:
    """Return a round's table row: its results as text, empty where a result is unknown."""
    collected = dict(evaluation.get("collected") or {})
    pairs = collected.pop(PAIRS, None)
    base, previous = evaluation.get("against_base"), evaluation.get("against_before")
    reward = evaluation.get("mean_reward")
    health = evaluation.get("health") or {}  # missing in rounds of earlier versions
    kl = health.get(KL)
    return [
        str(evaluation["round"]) if evaluation["round"] else "base",
        _format_count(pairs),
        _format_count(sum(collected.values()) if pairs is not None else None),
        "" if reward is None else f"{reward:.3f}",
        "" if base is None else _format_win_rate(base),
        "" if base is None else _format_percent(base["length_controlled_win_rate"]),
        "" if previous is None else _format_percent(previous["win_rate"]),
        f"{evaluation['mean_characters']:.0f}",
        "" if kl is None else f"{kl:.3f}",
        _format_percent(health.get(REPETITION)),
        _format_percent(health.get(CLIPPED)),
    ]


def round_page(evaluation: Evaluation) -> str:
    """Return the Markdown page of a round: its results, and some of its answers.

    Next to each answer, the page shows the answers of the initial policy and of the round before.
    """
    title = f"Round {evaluation['round']}" if evaluation["round"] else "The base"
    lines = [f"# {title}", "", *_figure_lines(evaluation), ""]
    names = [name for name in ("base", "before", "now") if name in evaluation["answers"][0]]
    lines += [_table_row(["prompt", *names]), _table_row(["---"] * (1 + len(names)))]
    for row in evaluation["answers"][:ANSWERS_PER_PAGE]:
        prompt = " / ".join(str(turn["content"]) for turn in row["prompt"])
        cells = [prompt, *(row[name] for name in names)]
        lines.append(_table_row([_escape_cell(cell) for cell in cells]))
    return "\n".join([*lines, ""])


def _figure_lines(evaluation: Evaluation) -> list[str]:
    """Return the results of a round as Markdown list items."""
    figures = zip(HEADINGS[1:], round_cells(evaluation)[1:], strict=True)
    lines = [f"* {name}: {cell}" for name, cell in figures if cell]
    for why, count in (evaluation.get("collected") or {}).items():
        if why != PAIRS:
            lines.append(f"* no pair, {why}: {count:,}")
    if truncated := evaluation.get("cut"):
        lines.append(f"* chosen answers that were cut at the token limit: {truncated:,}")
    if metrics := evaluation.get("held_out_pairs"):
        accuracy = metrics["eval_rewards/accuracies"]
        lines.append(f"* accuracy on the round's own held-out pairs: {accuracy:.1%}")
    doubts = (evaluation.get("against_base") or {}).get("doubts", {})
    lines += [f"* warning: {text}" for text in round_warnings(evaluation)]
    return lines + [f"* held-out prompts, {why}: {count:,}" for why, count in doubts.items()]


def _table_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape_cell(text: str) -> str:
    """Return the first 200 characters of a text on one line, with Markdown markup escaped."""
    return escape_markdown(" ".join(text.split())[:200]) or "(nothing)"


def _format_win_rate(comparison: Evaluation) -> str:
    low, high = comparison["interval_95"]
    return f"{_format_percent(comparison['win_rate'])} ({low:.1%} to {high:.1%})"


def _format_percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _format_count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"
