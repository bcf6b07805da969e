"""`mlx-dpo plan`: what a training run is going to need, before it begins."""

import json
from typing import TYPE_CHECKING, Any

import click

from mlx_dpo.cli.train import SettingsCommand, resolve, setting_flags
from mlx_dpo.config.training import EVALUATION

if TYPE_CHECKING:
    from mlx_dpo.plan import Capacity, RunEstimate

SummaryLine = tuple[str, str]


@click.command(cls=SettingsCommand)
@click.argument("pairs", nargs=-1)
@click.option("--config", "config_file", metavar="FILE", help="YAML file of settings.")
@click.option(
    "--memory",
    metavar="SIZE",
    help="Plan for a Mac with this memory (16GB). [default: this machine's]",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object: bytes, tokens, seconds.")
@setting_flags(lambda spec: spec.changes_result or spec.section == EVALUATION)
@click.pass_context
def plan(
    ctx: click.Context,
    /,
    config_file: str | None,
    memory: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Say what training on PAIRS is going to need: memory, work and time.

    The flags are those of `train`. The model's weights are neither read nor downloaded:
    memory and time are measured on a few of its blocks with random weights, at the lengths of
    the pairs, and drawn out to all of them.
    """
    config = resolve(ctx, config_file, False, flags)

    from mlx_dpo.plan import estimate_run
    from mlx_dpo.reporting.console import make_console, print_facts, show_progress
    from mlx_dpo.runs.inputs import no_progress

    console = make_console()
    shown = console.is_terminal and not as_json
    found = estimate_run(
        config,
        mac=memory,
        rows=lambda total: (
            show_progress(console, "tokens", total=total, unit="rows")
            if shown
            else no_progress(total)
        ),
    )
    if as_json:
        click.echo(json.dumps(found.to_dict()))
        return
    print_facts(console, summary_lines(found))


def summary_lines(found: "RunEstimate") -> list[SummaryLine]:
    """The forecast in lines for a person."""
    from mlx_dpo.runs.summary import format_count

    inputs, epoch = found.inputs, found.epoch
    return [
        ("model", f"{inputs.base.source}, {format_count(found.parameters)} parameters"),
        *[("", note) for note in inputs.base.notes],
        ("pairs", f"{len(inputs.train):,} to train on, {len(inputs.valid):,} held out"),
        *[("", line) for report in inputs.reports for line in report.lines()],
        ("", _lengths_line(found)),
        ("scorer", f"{found.choice.name}: {found.choice.reason}"),
        *_memory_lines(found),
        ("fits", _capacity_line(found.without, "kept activations")),
        ("", _capacity_line(found.recomputed, "blocks recomputed")),
        ("train", _choice_line(found)),
        (
            "epoch",
            f"{epoch.steps:,} steps, {epoch.passes:,} passes: {format_count(epoch.tokens)} tokens "
            f"through the blocks (whole rows: {format_count(epoch.whole_rows)}), "
            f"{format_count(epoch.rows)} rows through the head",
        ),
        (
            "work",
            f"{epoch.operations:.2e} operations an epoch, {epoch.reference_operations:.2e} to "
            "score the reference",
        ),
        (
            "time",
            f"about {_duration(epoch.seconds)} an epoch and "
            f"{_duration(epoch.reference_seconds)} for the reference on this machine, "
            "estimated from a short rehearsal",
        ),
    ]


def _lengths_line(found: "RunEstimate") -> str:
    lengths = found.lengths
    return (
        f"rows: half of them up to {lengths.median:,} tokens, 90 % up to {lengths.most:,}, "
        f"the longest {lengths.longest:,}"
    )


def _memory_lines(found: "RunEstimate") -> list[SummaryLine]:
    from mlx_dpo.runs.auto_batch_size import format_bytes

    parts, fitted = found.parts, found.fitted
    rows = (
        (parts.weights, "frozen weights"),
        (parts.adapters, "what is trained, its gradients and moments"),
        (parts.activations, "activations of the longest pass"),
        (parts.head, "logits of the head, and what is in flight"),
        (fitted.bytes, f"training, of {format_bytes(fitted.room.bytes)} ({fitted.room.what})"),
        (found.reference, "reference pass"),
    )
    lines = [f"{format_bytes(size):>8} {what}" for size, what in rows]
    return [("memory", lines[0]), *[("", line) for line in lines[1:]]]


def _capacity_line(most: "Capacity", how: str) -> str:
    if not most.tokens:
        return f"nothing, with {how}"
    all_of_them = ", all that the model places" if most.context else ""
    return (
        f"{most.pairs:,} of the longest pairs a pass, or one of up to {most.tokens:,} tokens"
        f"{all_of_them}; with {how}"
    )


def _choice_line(found: "RunEstimate") -> str:
    line = found.fitted.line()
    return line if found.fitted.fits else f"refused: {line.replace(', and begun by --force', '')}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
