"""Run training in a terminal: header, progress bars, warnings, final table, stop signals."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from rich.console import Console

from mlx_dpo import DPOTrainer
from mlx_dpo.cli import INTERRUPTED, program
from mlx_dpo.cli.end_of_run import print_ending
from mlx_dpo.cli.output import echo, print_warning
from mlx_dpo.distributed import heartbeats
from mlx_dpo.reporting.samples import print_samples
from mlx_dpo.reporting.terminal.console import make_console, print_label_table, print_rule
from mlx_dpo.reporting.terminal.steps import show_steps
from mlx_dpo.runs.summary import (
    summarize_inputs,
    summarize_training,
)
from mlx_dpo.startup.jit_cache import user_environment
from mlx_dpo.types import MetricsRow

SLEEP_WARNING = "`caffeinate` was not found; this Mac may fall asleep"


@contextmanager
def keep_awake(wanted: bool) -> Iterator[str | None]:
    """Keep a Mac awake inside the block if `wanted`.

    Only sleep from idleness is prevented. With a closed lid and no power supply the Mac sleeps,
    and the run continues when the Mac wakes up.

    Yields:
        A note that is printed before training; None if not `wanted` or not on a Mac.
    """
    if sys.platform != "darwin" or not wanted:
        yield None
        return
    if shutil.which("caffeinate") is None:
        yield SLEEP_WARNING
        return
    # -w: caffeinate ends when this process ends, for whatever reason.
    command = ["caffeinate", "-i", "-m", "-s", "-w", str(os.getpid())]
    helper = subprocess.Popen(command, env=user_environment())
    try:
        yield "kept awake by `caffeinate` while it trains (--no-caffeinate turns it off)"
    finally:
        helper.terminate()
        helper.wait()


def run_with_progress(
    run: DPOTrainer,
    resume_command: str | None = None,
    *,
    ranks_flags: str = "",
    verbose: bool = False,
) -> None:
    """Prepare the run and train with progress bars; on a stop signal, save and exit.

    Args:
        resume_command: command shown to the user after a stop signal; the default is
            `train --resume`.
        ranks_flags: flags that started the ranks, for that default.
        verbose: print details before training, such as scorer, micro-batches and memory.
    """
    with keep_awake(run.config.caffeinate) as awake:
        output = shlex.quote(run.config.output)
        default = f"{program()} train --resume --output {output}{ranks_flags}"
        heartbeats.note(command=resume_command or default)
        _run(run, awake, resume_command or default, verbose=verbose)


def _run(run: DPOTrainer, awake: str | None, resume_command: str, *, verbose: bool) -> None:
    console, config = make_console(), run.config
    try:
        _prepare(run, console, awake, verbose=verbose)
    except KeyboardInterrupt:
        has_record = run.paths.record.is_file()
        note = f"; resume with: {resume_command}" if has_record else ": nothing was written"
        echo(f"\nInterrupted before the first step{note}", err=True)
        raise SystemExit(INTERRUPTED) from None
    rows, began = list[MetricsRow](), perf_counter()
    warnings, samples = _WarningPrinter(run), _SamplePrinter(run, console)
    with (
        show_steps(
            console, total=run.total_steps, done=run.start.step, every=config.logging_steps
        ) as shown,
        _save_on_signals(run, shown.show_note) as received,
    ):
        for row in run.steps():
            shown.show(row)
            rows += [row] * ("loss" in row)
            samples.print_new()
            warnings.print_new()
    run.trackers.close(completed=True)
    warnings.print_new()
    if run.stopped:
        console.print(f"Stopped and saved; resume with: {resume_command}")
        raise SystemExit(128 + _first_signal(run, received))
    samples.print_last()
    print_ending(console, run, rows, perf_counter() - began)


def _first_signal(run: DPOTrainer, received: Sequence[int]) -> int:
    """Return the number of the signal that stopped the run, whichever rank received it."""
    numbers = run.ranks.all_gather_json("signals", list(received[:1]))
    return next((number for of_rank in numbers for number in of_rank), signal.SIGINT)


PRINTED_SAMPLES = 3  # at an evaluation, unless the settings have a number


class _SamplePrinter:
    """A printer of the answers that are sampled at evaluations.

    A terminal shows a few after each evaluation. A log shows them at the end only, unless the
    settings have a number of samples.
    """

    def __init__(self, run: DPOTrainer, console: Console) -> None:
        self._run, self._console = run, console
        self._printed = run.start.step  # last step whose samples are printed, or were

    def print_new(self) -> None:
        """Print the samples of an evaluation that took place since the last call."""
        if self._console.is_terminal or self._run.config.samples:
            self._print()

    def print_last(self) -> None:
        """Print the samples of the last evaluation, unless they are printed already."""
        self._print()

    def _print(self) -> None:
        recorded = self._run.answer_sampler
        if recorded is None or recorded.latest is None or recorded.latest.step <= self._printed:
            return
        print_samples(
            self._console, recorded.latest, limit=self._run.config.samples or PRINTED_SAMPLES
        )
        self._printed = recorded.latest.step


class _WarningPrinter:
    """A printer of a run's warnings, which prints each warning once.

    Warnings from before a resume are not printed again.
    """

    def __init__(self, run: DPOTrainer) -> None:
        self._run, self._printed = run, len(run.warnings)
        self._printed_of_trackers = 0

    def print_new(self) -> None:
        """Print the warnings of the run and its trackers that were added since the last call."""
        run = self._run
        new = run.warnings[self._printed :]
        new += run.trackers.warnings[self._printed_of_trackers :]
        for warning in new:
            print_warning(warning)
        self._printed, self._printed_of_trackers = len(run.warnings), len(run.trackers.warnings)


def _prepare(run: DPOTrainer, console: Console, awake: str | None, *, verbose: bool) -> None:
    run.load()
    print_label_table(console, summarize_inputs(run, verbose=verbose))
    run.attach()
    run.compute_reference_logps()
    run.restore()
    print_label_table(console, summarize_training(run, verbose=verbose))
    if awake is not None and (verbose or awake == SLEEP_WARNING):
        print_label_table(console, [("keep-awake", awake)])
    print_rule(console)


@contextmanager
def _save_on_signals(run: DPOTrainer, show_note: Callable[[str], None]) -> Iterator[list[int]]:
    """Save and stop on Ctrl-C, `kill` or a closed terminal; say so by `show_note`.

    A second Ctrl-C stops without saving.

    Yields:
        Signal numbers received so far.
    """
    received: list[int] = []

    def request_stop(number: int, frame: Any) -> None:
        received.append(number)
        run.request_stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        show_note("Saving after this step (Ctrl-C: stop without saving)")

    handlers = {
        number: signal.signal(number, request_stop)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
