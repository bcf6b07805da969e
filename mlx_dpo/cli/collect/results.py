"""Output that all kinds of `mlx-dpo collect` share: repaired files, progress, and the summary."""

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_dpo.cli import INTERRUPTED
from mlx_dpo.cli.output import echo
from mlx_dpo.errors import ModelError
from mlx_dpo.phases import phase

if TYPE_CHECKING:
    from mlx_dpo.collect.pairs_file import PairsFile
    from mlx_dpo.collect.session import TaskSampler
    from mlx_dpo.data.prompts import Prompt
    from mlx_dpo.generation.responder import Responder


def open_pairs_file(output: str) -> "PairsFile":
    """Open the file of pairs until the command ends, and print what was repaired.

    Raises:
        DataError: another program collects into the file, or it cannot be read or written.
    """
    from mlx_dpo.collect.pairs_file import PairsFile, lock_pairs

    path = Path(output).expanduser()
    click.get_current_context().with_resource(lock_pairs(path))
    pairs_file = PairsFile(path)
    for note in pairs_file.notes:
        echo(note, err=True)
    return pairs_file


def print_responder_notes(
    responders: "Sequence[Responder]", prompts: "list[Prompt]", max_tokens: int
) -> None:
    """Print the notes of loading models, and if a context is short for answers; each note once."""
    notes = [
        note
        for responder in responders
        for note in (*responder.notes, responder.clip_note(prompts, max_tokens))
    ]
    for note in dict.fromkeys(notes):
        if note is not None:
            echo(note, err=True)


def print_resumed(tasks: "TaskSampler") -> None:
    """Print how many prompts have a decision from an earlier run of the command."""
    done = len(tasks.prompts) - tasks.remaining
    if done:
        echo(f"{done:,} of {len(tasks.prompts):,} prompts already have a decision", err=True)


def run_with_progress(tasks: "TaskSampler", decisions: Iterable[object]) -> None:
    """Take all `decisions` about the tasks under a progress bar; Ctrl-C ends the program.

    Raises:
        ModelError: a server does not answer; the decisions so far are printed.
    """
    try:
        with phase("Collecting pairs", tasks.remaining, unit="prompts") as count:
            for _ in decisions:
                count(1)
    except ModelError:
        print_summary(tasks.pairs_file)
        raise
    except KeyboardInterrupt:
        print_summary(tasks.pairs_file)
        echo("Interrupted; run the same command to resume", err=True)
        raise SystemExit(INTERRUPTED) from None


def print_summary(pairs_file: "PairsFile") -> None:
    """Print the number of pairs, of prompts without a pair by reason, and what to do next."""
    from mlx_dpo.cli import program
    from mlx_dpo.collect.sample import (
        count_context_full,
        count_truncated,
        describe_outcomes,
        describe_ties,
    )

    pairs = pairs_file.pair_count
    echo(f"{pairs_file.path}: {describe_outcomes(pairs_file)}")
    if (ties := describe_ties(pairs_file)) is not None:
        advice = "" if pairs else "; use another reward, more --answers or a higher --temperature"
        echo(f"{'' if pairs else 'Warning: '}{ties}{advice}", err=True)
    full = count_context_full(pairs_file)
    for cut, where, advice in (
        (count_truncated(pairs_file) - full, "token limit", "raise --max-tokens"),
        (full, "end of the model's context", "use shorter prompts"),
    ):
        if cut:
            echo(
                f"{cut:,} of the chosen answers {'was' if cut == 1 else 'were'} cut at the "
                f"{where}, and the model would learn to stop there; {advice}",
                err=True,
            )
    if pairs:
        path = shlex.quote(str(pairs_file.path))
        echo(f"Train on them: {program()} train {path} --model MODEL")
