"""A run on the terminal: header, reference, steps, closing table, and Ctrl-C that saves."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from mlx_dpo.reporting.console import (
    closing_table,
    counting,
    make_console,
    print_facts,
    showing_steps,
)
from mlx_dpo.runs import Run
from mlx_dpo.runs.awake import kept_awake
from mlx_dpo.runs.facts import facts_of_inputs, facts_of_training


def watch(run: Run) -> None:
    """Prepare and train with everything a person wants to see; saves and leaves when asked to."""
    with kept_awake(run.config.caffeinate) as awake:
        _watch(run, awake)


def _watch(run: Run, awake: str | None) -> None:
    console, config = make_console(), run.config
    run.load()
    print_facts(console, facts_of_inputs(run))
    pairs = len(run.inputs.train) + len(run.inputs.valid)
    run.attach()
    with counting(console, "reference", total=pairs) as count:
        run.score_reference(count)
    run.restore()
    print_facts(console, facts_of_training(run))
    if awake:
        print_facts(console, [("awake", awake)])
    with (
        _saving_when_asked(run) as received,
        showing_steps(
            console, total=run.total_steps, done=run.start.step, every=config.logging_steps
        ) as shown,
    ):
        for row in run.train():
            shown.show(row)
    if run.stopped:
        console.print(
            f"Stopped and saved; go on with: mlx-dpo train --resume --output {config.output}"
        )
        raise SystemExit(128 + received[0])
    if run.evaluation is not None:
        title = f"{len(run.inputs.valid):,} held-out pairs"
        console.print(closing_table(run.evaluation, title=title))


@contextmanager
def _saving_when_asked(run: Run) -> Iterator[list[int]]:
    """Let Ctrl-C, `kill` and a closed terminal save first; a second Ctrl-C ends at once."""
    received: list[int] = []

    def ask(number: int, frame: Any) -> None:
        received.append(number)
        run.request_stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        click.echo("Saving after this step; Ctrl-C again to stop without", err=True)

    before = {
        number: signal.signal(number, ask)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
