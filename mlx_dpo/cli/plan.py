"""`mlx-dpo plan`: estimate the memory, computation and time of a training run."""

from typing import TYPE_CHECKING, Any

import click

from mlx_dpo.cli.output import echo_json
from mlx_dpo.cli.setting_flags import (
    SettingsCommand,
    config_flag,
    help_all_flag,
    pairs_argument,
    resolve,
    setting_flags,
)
from mlx_dpo.config.training import EVALUATION

if TYPE_CHECKING:
    from mlx_dpo.plan.run_estimate import Capacity, RunEstimate

SummaryLine = tuple[str, str]


@click.command(
    cls=SettingsCommand,
    examples=(
        "mlx-dpo plan pairs.jsonl --model mlx-community/Qwen3-4B-4bit",
        "mlx-dpo plan pairs.jsonl --model model --max-length 2048 --memory 16GB",
    ),
)
@pairs_argument
@config_flag
@click.option(
    "--memory",
    metavar="SIZE",
    help="Plan for a Mac with this much memory, such as 16GB.",
    show_default="this machine's",
)
@click.option(
    "--ranks",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="Plan for N machines that share the run: memory of each, traffic and speed.",
    show_default=True,
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@setting_flags(lambda spec: spec.changes_result or spec.section == EVALUATION)
@help_all_flag
@click.pass_context
def plan(
    ctx: click.Context,
    /,
    config_file: str | None,
    memory: str | None,
    ranks: int,
    as_json: bool,
    **flags: Any,
) -> None:
    """Estimate memory, computation and time of training on PAIRS.

    The flags are those of `train`. The model's weights are neither read nor downloaded. Memory and
    time are measured on a few layers with random weights and texts as long as the longest pairs,
    and extrapolated to all layers.
    """
    config = resolve(ctx, config_file, False, flags)

    from mlx_dpo.plan.run_estimate import estimate_run
    from mlx_dpo.reporting.terminal.console import make_console, print_label_table

    estimate = estimate_run(config, memory_size=memory, ranks=ranks)
    if as_json:
        echo_json(estimate.to_dict())
        return
    print_label_table(make_console(), summary_lines(estimate))


def summary_lines(estimate: "RunEstimate") -> list[SummaryLine]:
    """Return the lines (label, text) that the terminal shows for an estimate."""
    from mlx_dpo.runs.summary import describe_learning_rate, format_count
    from mlx_dpo.units import format_items

    inputs, epoch, unit = estimate.inputs, estimate.epoch, estimate.fitted.config.unit
    return [
        ("model", f"{inputs.base.source}, {format_count(estimate.parameters)} parameters"),
        *[("", note) for note in (*inputs.base.notes, *inputs.base.storage_notes)],
        (unit, f"{len(inputs.train):,} to train on, {len(inputs.valid):,} held out"),
        *[("", line) for report in inputs.reports for line in report.lines()],
        ("", _lengths_line(estimate)),
        ("scorer", f"{estimate.choice.name}: {estimate.choice.reason}"),
        *_memory_lines(estimate),
        ("fits", _capacity_line(estimate.without_recomputation, "saved activations")),
        ("", _capacity_line(estimate.with_recomputation, "recomputed layers")),
        ("train", _settings_line(estimate)),
        ("rate", describe_learning_rate(estimate.fitted.config, estimate.rate_reason)),
        (
            "epoch",
            f"{format_items(epoch.steps, 'steps')}, {epoch.passes:,} "
            f"pass{'es' * (epoch.passes != 1)}: {format_count(epoch.tokens)} tokens "
            f"through the layers (padded rows: {format_count(epoch.whole_rows)}), "
            f"{format_count(epoch.rows)} through the head",
        ),
        *_sharing_lines(estimate),
        (
            "work",
            f"{epoch.operations:.2e} operations per epoch, {epoch.reference_operations:.2e} to "
            f"score the reference on {epoch.reference_pairs:,} {unit}",
        ),
        (
            "time",
            f"about {_duration(epoch.seconds)} per epoch and "
            f"{_duration(epoch.reference_seconds)} for the reference on this machine, "
            "extrapolated from a few measured layers" + _time_of_two_passes(estimate),
        ),
        *_ranks_lines(estimate),
    ]


def _time_of_two_passes(estimate: "RunEstimate") -> str:
    """Say that the run takes less than was estimated, if it computes two passes at once."""
    if estimate.fitted.passes_at_once == 1:
        return ""
    return " one pass at a time; this run computes two at once and takes less"


def _ranks_lines(estimate: "RunEstimate") -> list[SummaryLine]:
    """Return the summary lines on several ranks, if the run has them."""
    from mlx_dpo.plan.ranks import describe_ranks

    if estimate.ranks is None:
        return []
    again = estimate.fitted.config.recompute
    capacity = estimate.with_recomputation if again else estimate.without_recomputation
    lines = describe_ranks(estimate.ranks, estimate.fitted, capacity.pairs)
    return [("" if number else "ranks", line) for number, line in enumerate(lines)]


def _sharing_lines(estimate: "RunEstimate") -> list[SummaryLine]:
    """Return a line on the tokens that passes save by shared beginnings, if they share any."""
    from mlx_dpo.units import format_items

    epoch = estimate.epoch
    if estimate.choice.name != "trie":
        return []
    saved = 1 - epoch.tokens / epoch.tokens_pair_by_pair
    prompts = format_items(epoch.prompts, "prompts")
    unit = estimate.fitted.config.unit
    pairs = f"{format_items(len(estimate.inputs.train), unit)} of {prompts}"
    text = f"{pairs}; shared beginnings save {saved:.1%} of the tokens of one {unit[:-1]} per pass"
    return [("", text)]


def _lengths_line(estimate: "RunEstimate") -> str:
    """Format the median, 90th percentile and maximum of the row lengths in tokens."""
    lengths = estimate.lengths
    return (
        f"row length: median {lengths.median:,} tokens, 90th percentile {lengths.most:,}, "
        f"maximum {lengths.longest:,}"
    )


def _memory_lines(estimate: "RunEstimate") -> list[SummaryLine]:
    """Return the summary lines on memory: the parts of a training step, and totals."""
    from mlx_dpo.units import format_bytes

    parts, fitted = estimate.parts, estimate.fitted
    available = f"{format_bytes(fitted.room.bytes, is_estimate=True)} ({fitted.room.description})"
    rows = (
        (parts.weights, "frozen weights"),
        (parts.adapters, "trained weights, their gradients and optimizer state"),
        (parts.activations, "activations of the longest pass"),
        (parts.head, "logits and intermediate arrays"),
        (fitted.bytes, f"training, of {available}"),
        (estimate.reference_bytes, "reference pass"),
    )
    lines = [f"{format_bytes(size, is_estimate=True):>8} {label}" for size, label in rows]
    return [("memory", lines[0]), *[("", line) for line in lines[1:]]]


def _capacity_line(capacity: "Capacity", mode: str) -> str:
    """Format how many of the longest pairs fit into memory, and how long a single pair may be.

    Args:
        mode: Text that says for which mode of training this holds.
    """
    if not capacity.tokens:
        return f"nothing, with {mode}"
    limit = ", the context length of the model" if capacity.context else ""
    return (
        f"{capacity.pairs:,} of the longest pairs per pass, or a single one of up to "
        f"{capacity.tokens:,} tokens{limit}; with {mode}"
    )


def _settings_line(estimate: "RunEstimate") -> str:
    """Format the chosen micro-batch size, or the reason why training would be refused."""
    line = estimate.fitted.describe()
    return (
        line if estimate.fitted.fits else f"refused: {line.replace(', and started by --force', '')}"
    )


def _duration(seconds: float) -> str:
    """Format a time in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.2g} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
