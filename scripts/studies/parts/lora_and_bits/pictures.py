"""Read the rows of the study of LoRA and bits, and draw its pictures."""

from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from mlx_dpo.evaluation.winrate import wilson_interval
from scripts.studies.parts.lora_and_bits.cells import (
    BASE,
    FULL,
    FULL_RATE,
    FULL_RATES,
    FUSED,
    LORA,
    LORA_RATE,
    LORA_RATES,
    MAIN,
    MODEL_BITS,
    PROMPTS,
    RANK,
    RANKS,
    Cell,
)
from scripts.studies.reporting.figures import add_axes, add_legend, draw_spread, line_style
from scripts.studies.reporting.study import Rows, column, of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mlx_dpo.reporting.plots import Theme


def cell_rows(rows: Rows, cell: Cell, *, fused_bits: int = 0) -> Rows:
    """Return the rows of a cell, or of the models that were fused from it."""
    method = FUSED if fused_bits else cell.method
    return of(rows, **cell._replace(method=method)._asdict(), fused_bits=fused_bits)


def value(rows: Rows, cell: Cell, name: str, *, fused_bits: int = 0) -> float:
    """Return the mean of a column over the rows of a cell."""
    return fmean(column(cell_rows(rows, cell, fused_bits=fused_bits), name))


def base_cell(bits: int) -> Cell:
    """Return the cell of the untrained model at these bits."""
    return Cell(BASE, 0, bits, 0)


def full_cell(multiple: int = FULL_RATE) -> Cell:
    """Return the cell of full fine-tuning at a multiple of the default rate."""
    return Cell(FULL, 0, MODEL_BITS, multiple)


def best_cell(rows: Rows, method: str) -> Cell:
    """Return the learning rate of a method at which most answers are courteous and correct."""
    cells = [full_cell(multiple) for multiple in FULL_RATES]
    if method == LORA:
        cells = [MAIN._replace(multiple=multiple) for multiple in LORA_RATES]
    return max(cells, key=lambda cell: value(rows, cell, "reward"))


def draw_bits(figure: "Figure", rows: Rows, theme: "Theme") -> None:
    """Draw reward, perplexity and distance from 16 bits by the bits of the base."""
    reward = add_axes(figure, 1, 3, 1, x_label="bits of the base", y_label="polite and correct")
    perplexity = add_axes(figure, 1, 3, 2, x_label="bits of the base", y_label="perplexity")
    distance = add_axes(
        figure, 1, 3, 3, x_label="bits of the base", y_label="KL from 16 bits (nats)", yscale="log"
    )
    aligned = of(rows, method=LORA, rank=RANK, multiple=LORA_RATE)
    for index, (label, group) in enumerate(
        (("base", of(rows, method=BASE)), ("base and adapter", aligned))
    ):
        draw_intervals(reward, theme, index, group, "bits", label)
        draw_spread(perplexity, theme, index, group, "bits", "perplexity", label=label)
        quantized = [row for row in group if row["bits"] != MODEL_BITS]
        draw_spread(distance, theme, index, quantized, "bits", "distance", label=label)
    for axes in (reward, perplexity, distance):
        axes.set_xscale("log", base=2)
        axes.set_xlim(1.8, 18)
        axes.set_xticks([2, 3, 4, 8, 16], labels=["2", "3", "4", "8", "16"])
        axes.set_xticks([], minor=True)
    reward.set_ylim(0, 1)
    add_legend(figure)


def draw_intervals(
    axes: "Axes", theme: "Theme", index: int, rows: Rows, x: str, label: str
) -> None:
    """Draw the reward over `x` with Wilson's 95 % intervals of the answers of all seeds."""
    places = sorted({float(row[x]) for row in rows})
    groups = [column(of(rows, **{x: place}), "reward") for place in places]
    means = np.array([fmean(group) for group in groups])
    bounds = [wilson_interval(PROMPTS * sum(group), PROMPTS * len(group)) for group in groups]
    errors = np.abs(np.array(bounds).T - means)
    axes.errorbar(places, means, yerr=errors, label=label, **line_style(theme, index))


def draw_rates_and_ranks(figure: "Figure", rows: Rows, theme: "Theme") -> None:
    """Draw reward by learning rate, correct answers by margin, and reward by rank."""
    good = "polite and correct"
    rates = add_axes(figure, 1, 3, 1, x_label="learning rate", y_label=good, xscale="log")
    kept = add_axes(figure, 1, 3, 2, x_label="held-out margin (nats)", y_label="correct")
    ranks = add_axes(figure, 1, 3, 3, x_label="rank", y_label=good)
    plain = of(rows, bits=MODEL_BITS)
    groups = (
        ("full fine-tuning", of(plain, method=FULL)),
        ("LoRA, rank 16", of(plain, method=LORA, rank=RANK)),
    )
    for index, (label, group) in enumerate(groups):
        draw_intervals(rates, theme, index, group, "learning_rate", label)
        style = line_style(theme, index) | {"linestyle": "", "label": label}
        kept.plot(column(group, "margin"), column(group, "correct"), **style)
    by_rank = of(plain, method=LORA, multiple=LORA_RATE)
    draw_intervals(ranks, theme, 2, by_rank, "rank", "LoRA by rank")
    best = value(rows, best_cell(rows, FULL), "reward")
    line = {"color": theme.colours[0], "linestyle": (0, (4, 2)), "linewidth": 1.2}
    ranks.axhline(best, label="full fine-tuning, best rate", **line)
    kept.axhline(
        value(rows, base_cell(MODEL_BITS), "correct"),
        color=theme.ink,
        linestyle=(0, (1, 2)),
        linewidth=1.2,
        label="base",
    )
    rates.set_xticks([0.001, 0.002, 0.005], labels=["0.001", "0.002", "0.005"])
    rates.set_xticks([], minor=True)
    ranks.set_xscale("log", base=2)
    ranks.set_xticks(RANKS, labels=list(map(str, RANKS)))
    ranks.set_xticks([], minor=True)
    for axes in (rates, ranks):
        axes.set_ylim(0.3, 1)
    add_legend(figure)
