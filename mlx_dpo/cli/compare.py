"""`mlx-dpo compare`: show answers of base and aligned model, shaded by log-ratio."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_dpo.cli.command import FILE, Command
from mlx_dpo.cli.output import echo
from mlx_dpo.cli.sampling_flags import sampling_flags
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.errors import ConfigError, DataError, reason
from mlx_dpo.io.atomic import write_file
from mlx_dpo.terminal_text import escape_controls, escape_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from mlx_dpo.data.prompts import Prompt
    from mlx_dpo.evaluation.compare import Comparison, ScoredAnswer

MIN_COLUMN_WIDTH = 30  # characters; on a narrower terminal answers are printed in sequence
DEFAULT_LIMIT = 20
STYLES = {
    1: "black on #d6e8ff", 2: "bold black on #9cc6ff", 3: "bold black on #4d9bff",
    -1: "black on #ffe6cc", -2: "underline black on #ffc080", -3: "underline black on #ff9933",
}  # fmt: skip


@click.command(
    cls=Command,
    examples=(
        "mlx-dpo compare run --html compare.html",
        "mlx-dpo compare run another-run prompts.txt",
    ),
    aliases={"--prompts": ""},
)
@click.argument("words", nargs=-1, required=True, metavar="RUN... [PROMPTS]", type=FILE)
@click.option("--html", type=FILE, metavar="FILE", help="Also write a self-contained HTML page.")
@click.option(
    "-n",
    "--limit",
    type=click.IntRange(min=0),
    default=DEFAULT_LIMIT,
    help="Number of prompts, from the beginning; 0 = all.",
)
@sampling_flags(
    temperature=0.0,
    max_tokens=256,
    remarks={"temperature": "The default gives the same answers each time."},
)
def compare(words: tuple[str, ...], html: str | None, limit: int, **settings: Any) -> None:
    """Compare answers of RUN with those of the model it started from, or of several RUNs.

    PROMPTS is a file of prompts or of pairs, also given as --prompts FILE; without it, the run's
    held-out prompts are used.
    Each token is shaded by log π − log π_ref, to show what training changed. A table below shows
    length, repetition, and the number of refusals by their wording, in five languages.
    """
    runs, prompts = _split_runs_and_prompts(words)
    page = None if html is None else _html_path(html)
    sampling = Sampling(**settings)

    from mlx_dpo.evaluation.compare import compare_runs
    from mlx_dpo.reporting.terminal.console import make_console

    comparison = compare_runs(runs, prompts, sampling, limit=limit or None)
    if page is not None:
        _write_page(page, comparison, " and ".join(runs))
    for note in (*comparison.model_notes, *comparison.notes):
        echo(note, err=True)
    _print_comparison(make_console(), comparison)
    if page is not None:
        echo(f"Written to {page}", err=True)


def _split_runs_and_prompts(words: Sequence[str]) -> tuple[list[str], str | None]:
    """Split the command's arguments into run folders and an optional file of prompts.

    The last of several arguments can name the file of prompts.
    """
    is_run = [(Path(word).expanduser() / "run.json").is_file() for word in words]
    if len(words) > 1 and not is_run[-1]:
        return list(words[:-1]), words[-1]
    return list(words), None


def _html_path(name: str) -> Path:
    path = Path(name).expanduser()
    if path.suffix not in (".html", ".htm"):
        raise ConfigError(f"{name}: `--html` writes a page; give a name that ends in `.html`")
    return path


def _write_page(path: Path, comparison: "Comparison", title: str) -> None:
    from mlx_dpo.reporting.compare_page import Comparison as PageContent
    from mlx_dpo.reporting.compare_page import Completion, render_compare_page

    content = PageContent(
        f"mlx-dpo compare {title}",
        comparison.notes,
        [policy.name for policy in comparison.policies],
        [_turns(prompt) for prompt in comparison.prompts],
        [
            [Completion([(s.text, s.log_ratio) for s in a.spans], a.end) for a in answers]
            for answers in zip(*(policy.answers for policy in comparison.policies), strict=True)
        ],
        [policy.summary() for policy in comparison.policies],
    )
    try:
        write_file(path, render_compare_page(content))
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({reason(error)})") from error


def _turns(prompt: "Prompt") -> list[tuple[str, str]]:
    return [(str(turn["role"]), str(turn["content"])) for turn in prompt.messages]


def _print_comparison(console: "Console", comparison: "Comparison") -> None:
    fits = console.is_terminal and console.width >= MIN_COLUMN_WIDTH * len(comparison.policies)
    for number, prompt in enumerate(comparison.prompts):
        console.print()
        for role, text in _turns(prompt):
            console.print(f"{role}: {text}", style="bold")
        cells = [(policy.name, policy.answers[number]) for policy in comparison.policies]
        if fits:
            console.print(_table(cells))
            continue
        for name, answer in cells:
            console.print(
                _column_title(name, answer),
                _shade_answer(answer, ends=console.is_terminal),
                sep="\n",
            )
    console.print()
    if console.is_terminal:
        _print_legend(console)
    else:
        echo("Tokens are shaded on a terminal and on the page of --html", err=True)
    console.print(_summary_table(comparison))


def _print_legend(console: "Console") -> None:
    """Print what the shades mean, with a swatch of each."""
    from rich.text import Text

    from mlx_dpo.reporting.compare_page import END_EXPLANATION, EXPLANATION, legend_swatches

    shaded = [swatch for swatch in legend_swatches() if swatch.level]  # fit 80 columns
    swatches = [Text(swatch.label, style=STYLES[swatch.level]) for swatch in shaded]
    console.print(EXPLANATION)
    console.print(Text(" ").join(swatches) + Text(" nats"))
    console.print(END_EXPLANATION)


def _table(cells: Sequence[tuple[str, "ScoredAnswer"]]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, expand=True)
    for name, answer in cells:
        table.add_column(_column_title(name, answer), overflow="fold", ratio=1)
    table.add_row(*(_shade_answer(answer) for _, answer in cells))
    return table


def _column_title(name: str, answer: "ScoredAnswer") -> "Text":
    from rich.text import Text

    cut = ", cut" if answer.end is None else ""
    return Text(f"{escape_line(name)} (log-ratio {answer.log_ratio:+.2f} nats{cut})", style="dim")


def _shade_answer(answer: "ScoredAnswer", *, ends: bool = True) -> "Text":
    from rich.text import Text

    from mlx_dpo.reporting.compare_page import END_MARK, shade_level

    text = Text()
    for span in answer.spans:
        text.append(escape_controls(span.text), style=STYLES.get(shade_level(span.log_ratio)))
    if ends and answer.end is not None and shade_level(answer.end):
        text.append(END_MARK, style=STYLES[shade_level(answer.end)])
    return text


def _summary_table(comparison: "Comparison") -> Any:
    from rich.box import SIMPLE
    from rich.table import Table

    summaries = [policy.summary() for policy in comparison.policies]
    count = len(comparison.prompts)
    title = f"{count:,} prompt{'s' * (count != 1)}"
    table = Table(title=title, title_justify="left", box=SIMPLE)
    table.add_column()
    for policy in comparison.policies:
        table.add_column(policy.name, justify="right")
    for label in summaries[0]:
        table.add_row(label, *(summary[label] for summary in summaries))
    return table
