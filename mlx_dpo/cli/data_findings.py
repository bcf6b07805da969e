"""What `data check` prints: rows and pairs, lengths, findings."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mlx_dpo.data.inspect.check import Checked, Finding, findings
from mlx_dpo.data.inspect.scan import Split
from mlx_dpo.reporting.pair_view import format_histogram, format_length_summary

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = 5  # places and details of each finding; --json has all of them
STYLES = {"fault": "bold red", "remark": "bold yellow"}


def print_checked(console: "Console", checked: Checked) -> None:
    """All that was found, for a person."""
    for name, split in checked.splits.items():
        if checked.valid is not None:
            console.print({"train": "to train on", "valid": "held out"}[name], style="bold")
        for line in head(split, cuts=checked.train.eyes.tokens is not None):
            console.print(line, markup=False)
        if len(split.lengths):
            console.print()
            for line in length_lines(split):
                console.print(line, markup=False)
        console.print()
        for finding in findings(split):
            _print_finding(console, finding, split)
    for need, names in checked.not_looked_for.items():
        console.print(f"not looked for without {need}: {', '.join(names)}", markup=False)
    count = checked.faults
    kinds = "1 kind of fault" if count == 1 else f"{count} kinds of faults"
    console.print(kinds if count else "no faults")


def head(split: Split, *, cuts: bool) -> Iterator[str]:
    """Rows in, pairs out, and what was done to them; `cuts` if they were tokenized."""
    what = "judged answers" if split.eyes.rows.judged else "pairs"
    for report in split.reports:
        if not report.kept:
            yield f"{report.source}: no {what}, of {report.read:,} rows"
            continue
        named, tokens, *others = report.done()
        yield f"{named}, of {report.read:,} rows"
        yield from [tokens, *others] if cuts else others
    if len(split.reports) > 1:
        yield f"together: {split.rows:,} rows, {split.pairs:,} {what}"
    prompts = sum(report.prompt_tokens for report in split.reports)
    answers = sum(report.chosen_tokens + report.rejected_tokens for report in split.reports)
    if prompts and not split.eyes.rows.judged:
        saved = prompts / (2 * prompts + answers)
        yield f"prompts are shared by both answers: {saved:.0%} fewer tokens than in whole rows"


def length_lines(split: Split) -> Iterator[str]:
    """Lengths and what they tell."""
    lengths = split.lengths
    yield from format_length_summary(lengths.spreads())
    yield ""
    yield from format_histogram(lengths.parts, lengths.histogram(), lengths.unit)
    bias = lengths.bias()
    if bias is None:
        return
    yield ""
    linked = "" if bias.correlation is None else f", correlation {bias.correlation:+.2f}"
    yield (
        f"chosen is longer in {bias.chosen_longer / bias.pairs:.1%} of the pairs, rejected in "
        f"{bias.rejected_longer / bias.pairs:.1%}{linked}; length alone tells "
        f"{bias.told_apart:.1%} apart"
    )


def _print_finding(console: "Console", finding: Finding, split: Split) -> None:
    rule = finding.rule
    unit = "answers" if rule.counts == "pairs" and split.eyes.rows.judged else rule.counts
    unit = unit.removesuffix("s" * (finding.count == 1))
    console.print(f"{rule.kind:<6} {rule.name}", style=STYLES[rule.kind], end="")
    counted = f"{finding.count:,} {unit} ({_share(finding.share)})"
    console.print(f"  {counted}  {_examples(finding, split)}".rstrip(), markup=False)
    for detail, count in list(finding.details.items())[:SHOWN]:
        console.print(f"       {count:,} × {detail}", markup=False)
    console.print(f"       why: {rule.why}", markup=False)
    console.print(f"       do:  {rule.mend}", markup=False)


def _examples(finding: Finding, split: Split) -> str:
    places: list[str] = []
    for at, other in finding.places():
        if len(places) == SHOWN:
            return ", ".join([*places, "…"])
        short = _short(at, split)
        places.append(short if other is None else f"{short} with {_short(other, split)}")
    return ", ".join(places)


def _short(place: str, split: Split) -> str:
    """`:12` is enough where there is but one source."""
    if len(split.reports) > 1:
        return place
    return place.removeprefix(split.reports[0].source)


def _share(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else "under 0.1%"
