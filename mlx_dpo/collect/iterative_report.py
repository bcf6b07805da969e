"""The rounds of a loop as Markdown: one line for each, and one page for each. Text in, text out."""

from collections.abc import Mapping, Sequence
from typing import Any

Evaluation = Mapping[str, Any]
PAIRS = "pairs"  # among the counts of what was collected
ANSWERS_PER_PAGE = 8  # prompts whose answers stand on a round's page
HEADINGS = (
    "round",
    "pairs",
    "no pair",
    "held-out reward",
    "won against the base (95 %)",
    "at equal length",
    "won against the round before",
    "characters",
)
LEGEND = (
    "Won: the share of held-out prompts on which this round's answer is preferred, a tie being "
    "half a win; the interval is Wilson's. At equal length: by a logistic regression on the "
    "difference in length, as in AlpacaEval 2 (arXiv:2404.04475)."
)


def summary_page(rounds: Sequence[Evaluation], judge: str) -> str:
    """All rounds so far, as a table."""
    lines = ["# Rounds", "", f"Judged by {judge}.", "", _table_row(HEADINGS)]
    lines += [
        _table_row(["--:"] * len(HEADINGS)),
        *(_table_row(round_cells(found)) for found in rounds),
    ]
    return "\n".join([*lines, "", LEGEND, ""])


def round_cells(found: Evaluation) -> list[str]:
    """A round's figures, under `HEADINGS`."""
    collected = dict(found.get("collected") or {})
    pairs = collected.pop(PAIRS, None)
    base, before = found.get("against_base"), found.get("against_before")
    reward = found.get("mean_reward")
    return [
        str(found["round"]) if found["round"] else "base",
        _format_count(pairs),
        _format_count(sum(collected.values()) if pairs is not None else None),
        "" if reward is None else f"{reward:.3f}",
        "" if base is None else _format_win_rate(base),
        "" if base is None else _format_percent(base["length_controlled_win_rate"]),
        "" if before is None else _format_percent(before["win_rate"]),
        f"{found['mean_characters']:.0f}",
    ]


def round_page(found: Evaluation) -> str:
    """One round: its figures, and some of its answers beside those before it."""
    title = f"Round {found['round']}" if found["round"] else "The base"
    lines = [f"# {title}", ""]
    figures = zip(HEADINGS[1:], round_cells(found)[1:], strict=True)
    lines += [f"* {name}: {cell}" for name, cell in figures if cell]
    for why, count in (found.get("collected") or {}).items():
        if why != PAIRS:
            lines.append(f"* passed over, {why}: {count:,}")
    if cut := found.get("cut"):
        lines.append(f"* chosen answers that were cut where their tokens ran out: {cut:,}")
    pairs = found.get("held_out_pairs")
    if pairs:
        accuracy = pairs["eval_rewards/accuracies"]
        lines.append(f"* accuracy on the round's own held-out pairs: {accuracy:.1%}")
    doubts = (found.get("against_base") or {}).get("doubts", {})
    lines += [f"* held-out prompts, {why}: {count:,}" for why, count in doubts.items()]
    names = [name for name in ("base", "before", "now") if name in found["answers"][0]]
    lines += ["", _table_row(["prompt", *names]), _table_row(["---"] * (1 + len(names)))]
    for shown in found["answers"][:ANSWERS_PER_PAGE]:
        asked = " / ".join(str(turn["content"]) for turn in shown["prompt"])
        lines.append(
            _table_row([_escape_cell(asked), *(_escape_cell(shown[name]) for name in names)])
        )
    return "\n".join([*lines, ""])


def _table_row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _escape_cell(text: str) -> str:
    """Text that stays inside its cell and is no markup."""
    plain = " ".join(text.split())[:200]
    for sign in "\\`*_<>|[]":
        plain = plain.replace(sign, f"\\{sign}")
    return plain or "(nothing)"


def _format_win_rate(against: Evaluation) -> str:
    low, high = against["interval_95"]
    return f"{_format_percent(against['win_rate'])} ({low:.1%} to {high:.1%})"


def _format_percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _format_count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"
