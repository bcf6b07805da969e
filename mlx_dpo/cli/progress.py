"""A run on the terminal: header, reference, steps, closing table, and Ctrl-C that saves."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console

from mlx_dpo import DPOTrainer
from mlx_dpo.cli import INTERRUPTED, program
from mlx_dpo.reporting.console import (
    final_metrics_table,
    make_console,
    print_facts,
    show_progress,
    show_steps,
)
from mlx_dpo.runs.summary import summarize_end, summarize_inputs, summarize_training


@contextmanager
def keep_awake(wanted: bool) -> Iterator[str | None]:
    """Keep a Mac awake inside the block; yields what to tell the person, None elsewhere.

    Idle sleep is held off; a closed lid without power still sleeps, and the run goes on
    when it opens.
    """
    if sys.platform != "darwin" or not wanted:
        yield None
        return
    if shutil.which("caffeinate") is None:
        yield "`caffeinate` was not found; this Mac may fall asleep"
        return
    # -w: it ends with this process, whatever ends this process.
    helper = subprocess.Popen(["caffeinate", "-i", "-m", "-s", "-w", str(os.getpid())])
    try:
        yield "kept awake by `caffeinate` while it trains (--no-caffeinate turns it off)"
    finally:
        helper.terminate()
        helper.wait()


def run_with_progress(run: DPOTrainer, go_on: str | None = None) -> None:
    """Prepare and train with everything a person wants to see; saves and leaves when asked to.

    `go_on` is what to type to go on then, where it is not `train`.
    """
    with keep_awake(run.config.caffeinate) as awake:
        _run(run, awake, go_on or f"{program()} train --resume --output {run.config.output}")


def _run(run: DPOTrainer, awake: str | None, go_on: str) -> None:
    console, config = make_console(), run.config
    try:
        _prepare(run, console, awake)
    except KeyboardInterrupt:
        begun = run.paths.record.is_file()
        kept = f"; go on with: {go_on}" if begun else ": nothing was written"
        click.echo(f"\nInterrupted before the first step{kept}", err=True)
        raise SystemExit(INTERRUPTED) from None
    warnings = _WarningPrinter(run)
    with (
        _save_on_signals(run) as received,
        show_steps(
            console, total=run.total_steps, done=run.start.step, every=config.logging_steps
        ) as shown,
    ):
        for row in run.train():
            shown.show(row)
            warnings.say()
    run.trackers.close(completed=True)
    warnings.say()
    if run.stopped:
        console.print(f"Stopped and saved; go on with: {go_on}")
        raise SystemExit(128 + received[0])
    print_facts(console, summarize_end(run))
    if run.evaluation is not None:
        title = f"{len(run.inputs.valid):,} held-out {config.unit}"
        console.print(final_metrics_table(run.evaluation, title=title))


class _WarningPrinter:
    """What goes wrong, each thing said once; a run that goes on has said some before."""

    def __init__(self, run: DPOTrainer) -> None:
        self._run, self._heard = run, len(run.warnings)
        self._lost = 0

    def say(self) -> None:
        """Say what was not said yet."""
        run = self._run
        for sentence in run.warnings[self._heard :] + run.trackers.warnings[self._lost :]:
            # `click.echo` writes into the live bar's line where the locale is not UTF-8.
            print(f"Warning: {sentence}", file=sys.stderr)
        self._heard, self._lost = len(run.warnings), len(run.trackers.warnings)


def _prepare(run: DPOTrainer, console: Console, awake: str | None) -> None:
    run.load(
        lambda total: show_progress(console, "reference model", total=total),
        lambda total: show_progress(console, "tokens", total=total, unit="rows"),
    )
    print_facts(console, summarize_inputs(run))
    run.attach()
    if run.config.needs_reference and run.config.reference_model is None:
        config = run.config
        pairs = len(run.inputs.train) + len(run.inputs.valid)
        with show_progress(console, "reference", total=pairs, unit=config.unit) as count:
            run.score_reference(count)
    else:
        run.score_reference()
    run.restore()
    print_facts(console, summarize_training(run))
    if awake:
        print_facts(console, [("awake", awake)])


@contextmanager
def _save_on_signals(run: DPOTrainer) -> Iterator[list[int]]:
    """Let Ctrl-C, `kill` and a closed terminal save first; a second Ctrl-C ends at once."""
    received: list[int] = []

    def ask(number: int, frame: Any) -> None:
        received.append(number)
        run.request_stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        click.echo("\nSaving after this step (Ctrl-C: stop without saving)", err=True)

    before = {
        number: signal.signal(number, ask)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
