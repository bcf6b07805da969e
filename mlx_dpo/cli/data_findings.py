"""Print the results of `mlx-dpo data check`: row and pair counts, text lengths and findings."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mlx_dpo.data.inspect.findings import MODEL, VALID
from mlx_dpo.data.inspect.results import CheckResults, Finding, list_findings
from mlx_dpo.data.inspect.scan import SplitScan
from mlx_dpo.data.report import PairsReport
from mlx_dpo.reporting.pair_view import format_histogram, format_length_summary

if TYPE_CHECKING:
    from rich.console import Console

HOW_TO_RUN = {MODEL: "pass --model to run them", VALID: "they need held-out pairs"}
MAX_SHOWN = 5  # locations and details of each finding; --json has all of them
STYLES = {"error": "bold red", "warning": "bold yellow"}


def print_results(console: "Console", results: CheckResults) -> None:
    """Print the results of all splits as text: row and pair counts, text lengths and findings."""
    for name, split in results.splits.items():
        if results.valid is not None:
            console.print({"train": "training", "valid": "held out"}[name], style="bold")
        for line in format_counts(split):
            console.print(line)
        if len(split.lengths):
            console.print()
            for line in format_lengths(split):
                console.print(line)
        console.print()
        for finding in list_findings(split):
            _print_finding(console, finding, split)
    for requirement, names in results.skipped.items():
        console.print(f"skipped checks ({HOW_TO_RUN[requirement]}): {', '.join(names)}")
    count = results.error_count
    kinds = "1 kind of error" if count == 1 else f"{count} kinds of errors"
    console.print(kinds if count else "no errors")


def format_counts(split: SplitScan) -> Iterator[str]:
    """Yield lines with the number of rows, pairs, tokens and changed pairs of each data source."""
    rows = split.settings.rows
    unit = f"{PairsReport('', 0, rows.judged, rows.supervised).unit}s"
    for report in split.reports:
        if not report.used:
            yield f"{report.source}: 0 {unit}, from {report.read:,} rows"
            continue
        counts, tokens, *changes = report.loaded_lines()
        yield f"{counts}, from {report.read:,} rows"
        yield from changes if split.settings.tokens is None else [tokens, *changes]
    if len(split.reports) > 1:
        yield f"total: {split.rows:,} rows, {split.pairs:,} {unit}"
    prompts = sum(report.prompt_tokens for report in split.reports)
    answers = sum(report.chosen_tokens + report.rejected_tokens for report in split.reports)
    if prompts and not (rows.judged or rows.supervised):
        saved = prompts / (2 * prompts + answers)
        yield f"sharing the prompt between both answers saves {saved:.0%} of the tokens"


def format_lengths(split: SplitScan) -> Iterator[str]:
    """Yield lines on the text lengths in a split: statistics, a histogram and the length bias."""
    lengths = split.lengths
    yield from format_length_summary(lengths.summaries())
    yield ""
    yield from format_histogram(lengths.parts, lengths.histogram(), lengths.unit)
    bias = lengths.bias()
    if bias is None:
        return
    yield ""
    correlation = "" if bias.correlation is None else f", correlation {bias.correlation:+.2f}"
    yield (
        f"chosen is longer in {bias.chosen_longer / bias.pairs:.1%} of the pairs, rejected in "
        f"{bias.rejected_longer / bias.pairs:.1%}{correlation}; "
        f"a length-only classifier would be right on {bias.accuracy:.1%} of pairs"
    )


def _print_finding(console: "Console", finding: Finding, split: SplitScan) -> None:
    check = finding.check
    rows = split.settings.rows
    is_single = rows.judged or rows.supervised
    unit = "answers" if check.unit == "pairs" and is_single else check.unit
    unit = unit.removesuffix("s" * (finding.count == 1))
    console.print(f"{check.severity:<7} {check.name}", style=STYLES[check.severity], end="")
    counts = f"{finding.count:,} {unit} ({_format_share(finding.share)})"
    console.print(f"  {counts}  {_format_locations(finding, split)}".rstrip())
    for detail, count in list(finding.details.items())[:MAX_SHOWN]:
        console.print(f"        {count:,} × {detail}")
    console.print(f"        why: {check.why}")
    console.print(f"        do:  {check.advice}")


def _format_locations(finding: Finding, split: SplitScan) -> str:
    shown: list[str] = []
    for location, related in finding.locations():
        if len(shown) == MAX_SHOWN:
            return ", ".join([*shown, "…"])
        short = _shorten(location, split)
        shown.append(short if related is None else f"{short} with {_shorten(related, split)}")
    return ", ".join(shown)


def _shorten(location: str, split: SplitScan) -> str:
    """Return the location, without the name of the source if there is only one source."""
    if len(split.reports) > 1:
        return location
    return location.removeprefix(split.reports[0].source)


def _format_share(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else "under 0.1%"
