"""Write docs/evidence.md and its pictures from the rows of the studies in docs/evidence.

python -m scripts.tools.docs.evidence_page
python -m scripts.tools.docs.evidence_page --rows FOLDER --docs FOLDER     other rows, elsewhere
"""

import hashlib
import html
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import click
from click import ClickException

from mlx_dpo.reporting.plots import DARK, LIGHT
from scripts.studies import NAMES, load_study
from scripts.studies.mutations import MUTATIONS, UNCHANGED
from scripts.studies.reporting import csv_rows
from scripts.studies.reporting.csv_rows import read_rows
from scripts.studies.reporting.figures import draw_picture
from scripts.studies.reporting.formats import (
    format_bound,
    format_duration,
    format_number,
    strip_markdown,
)
from scripts.studies.reporting.study import (
    Finding,
    Picture,
    Row,
    Rows,
    Study,
    Table,
    Value,
    check_claims,
)

DOCS = csv_rows.FOLDER.parent
PAGE = DOCS / "evidence.md"
PICTURES = "img/evidence"  # in docs/
THEMES = {"light": LIGHT, "dark": DARK}

HEAD = """# Evidence

<!-- made by scripts/tools/docs/evidence_page.py from docs/evidence/*.csv -->

This page compares the package with published results. Each study trains toy models with the code
that trains language models, and measures the trained policies. Most models are so small that the
probability of every answer can be computed: their numbers are exact, not sampled. The studies of
LoRA and of principles sample answers of a chat model. A study runs offline, on a laptop, in
minutes.

The table lists the studies. For a quick look, read each question and look at the figures; the
claims give numbers, and the deviations say where a study differs from the papers. An answer is a
completion. The base model is the model before preference training; unless the text says otherwise,
it is the reference π_ref. π\\* is the optimal policy. The true reward is known; labels are made
from it.

Each claim has a bound, and a test checks the bounds. [Twelve faults](#mutations) are put into the
package, one at a time, to see that wrong code breaks the bounds. Bounds were set with a margin
after numbers of these seeds were known: they find faults, they are no predictions.

After [`./scripts/setup --dev`](../CONTRIBUTING.md) and `source .venv/bin/activate`:

```sh
python -m scripts.studies.optimum             # a study: its claims with their numbers
python -m scripts.studies.optimum --quick     # one seed and fewer settings, under a minute
python -m scripts.studies.mutations           # the twelve faults
python -m scripts.tools.docs.evidence_page    # this page, from the rows in docs/evidence
```

A seed changes model, data and training, unless the setup says otherwise. A measured number is the
mean over the seeds, with minimum and maximum in brackets. A claim holds if the number of every
seed keeps the bound; some claims have one number, computed from all seeds. No study uses a GPU.
"""
NO_ROWS = "\nThese studies have no rows yet: {names}.\n"
MUTATIONS_HEAD = """
<a id="mutations"></a>

## Twelve faults

Each fault changes a few words of the package in a copy of the checkout, and the quick form of
studies runs there. A study finds the fault if one of its claims fails. A crash is not a find.
The control is a copy without a change.

```sh
python -m scripts.studies.mutations
```

"""
NO_MUTATIONS = "They have not been run yet.\n"


class Result(NamedTuple):
    """A study with its rows, the facts of their run, and the numbers of its claims."""

    study: Study
    rows: Rows
    run: Row
    findings: Sequence[Finding]


def read_results(folder: Path = csv_rows.FOLDER) -> Iterator[Result]:
    """Yield the result of every study that has rows in a folder.

    Raises:
        ClickException: a study has rows, but its run is not in runs.csv.
    """
    runs = folder / csv_rows.RUNS.name
    known = {str(run["study"]): run for run in (read_rows(runs) if runs.exists() else [])}
    for name in NAMES:
        path = folder / f"{name}.csv"
        if not path.exists():
            continue
        if name not in known:
            raise ClickException(f"{runs}: it has no run of {name}; run the study again")
        rows, study, run = read_rows(path), load_study(name), known[name]
        findings = check_claims(study, rows, quick=run["form"] == "quick")
        yield Result(study, rows, run, tuple(findings))


def page(folder: Path = csv_rows.FOLDER) -> str:
    """Return the page as Markdown, from the rows in a folder.

    Raises:
        ClickException: no study has rows.
    """
    results = list(read_results(folder))
    if not results:
        raise ClickException(f"{folder}: no study has rows; run `python -m scripts.studies.NAME`")
    missing = [f"`{n}`" for n in NAMES if n not in {result.study.name for result in results}]
    parts = [HEAD, _summary(results)]
    parts += [NO_ROWS.format(names=", ".join(missing))] * bool(missing)
    parts += map(_section, results)
    mutations = folder / csv_rows.MUTATIONS.name
    rows = read_rows(mutations) if mutations.exists() else []
    return "".join([*parts, MUTATIONS_HEAD, _mutations(rows) if rows else NO_MUTATIONS])


def write_pictures(folder: Path, docs: Path) -> None:
    """Draw the pictures of the studies that have rows in `folder` to img/evidence in `docs`."""
    target = docs / PICTURES
    target.mkdir(parents=True, exist_ok=True)
    written = set()
    for study, rows, *_ in read_results(folder):
        stamp = rows_stamp(folder / f"{study.name}.csv")
        for picture in study.pictures:
            for theme, colours in THEMES.items():
                path = docs / picture_path(study, picture, theme)
                path.write_bytes(draw_picture(picture, rows, colours) + stamp)
                written.add(path)
    for path in set(target.glob("*.svg")) - written:
        path.unlink()


def rows_stamp(path: Path) -> bytes:
    """Return the XML comment that ends a picture: which rows it was drawn from."""
    return f"<!-- rows {hashlib.sha256(path.read_bytes()).hexdigest()[:16]} -->\n".encode()


def picture_path(study: Study, picture: Picture, theme: str) -> str:
    """Return the path of a picture in docs/."""
    return f"{PICTURES}/{study.name}-{picture.name}-{theme}.svg"


def alt_text(study: Study, picture: Picture) -> str:
    """Return the study's title and the caption's first sentence as the text of an attribute."""
    sentence = re.split(r"(?<=[.;])\s", strip_markdown(picture.caption))[0].rstrip(".;")
    return html.escape(f"{study.title}. {sentence}")


def _summary(results: Sequence[Result]) -> str:
    lines = ["\n| study | result | claims that hold | time |\n|---|---|--:|--:|\n"]
    for study, _, run, findings in results:
        held = sum(finding.holds for finding in findings)
        count = f"{held} of {len(findings)}"
        lines.append(
            f"| [{study.title}](#{study.name}) | {study.result} "
            f"| {count if held == len(findings) else f'**{count}**'} "
            f"| {format_duration(float(run['seconds']))} |\n"
        )
    return "".join(lines)


def _section(result: Result) -> str:
    study, rows, _, findings = result
    parts = [
        f'\n<a id="{study.name}"></a>\n\n## {study.title}\n\n{study.question}\n',
        f"\n**Result.** {study.result}\n",
        f"\n**Setup.** {study.setup}\n",
        _command(result),
        *(_picture(study, picture) for picture in study.pictures),
        *(_table(table, rows) for table in study.tables),
        "\n| claim | source | bound | measured | result |\n|---|---|---|---|---|\n",
        *map(_claim, findings),
    ]
    parts += _folded("Deviations from the papers", study.deviations)
    parts += _folded("Sources", study.sources)
    return "".join(parts)


def _folded(summary: str, items: Sequence[str]) -> Iterator[str]:
    """Yield a list that opens at a click on its summary, if there are any items."""
    if not items:
        return
    yield f'\n<details markdown="1">\n<summary>{summary} ({len(items)})</summary>\n\n'
    yield from (f"- {item}\n" for item in items)
    yield "\n</details>\n"


def _command(result: Result) -> str:
    study, rows, run, _ = result
    flag = " --quick" if run["form"] == "quick" else ""
    seeds = _seeds(run)
    return (
        f"\n```sh\npython -m scripts.studies.{study.name}{flag}\n```\n\n"
        f"{format_duration(float(run['seconds']))} on {run['machine']} with {run['cores']} cores "
        f"(load {run['load']} before the start; {format_duration(float(run['cpu_seconds']))} of "
        f"processor time); {run['peak_mb']} MB of memory at the peak. Commit {run['commit']}, "
        f"{run['date']} UTC, {run['versions']}. Seeds {', '.join(seeds)} (n = {len(seeds)}). "
        f"[Rows](evidence/{study.name}.csv): {len(rows):,}.\n"
    )


def _seeds(run: Row) -> list[str]:
    return str(run["seeds"]).split()


def _picture(study: Study, picture: Picture) -> str:
    light, dark = (picture_path(study, picture, theme) for theme in THEMES)
    return (
        f'\n<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{alt_text(study, picture)}" src="{light}"></picture>\n\n'
        f"**Figure.** {picture.caption}\n"
    )


def _table(table: Table, rows: Rows) -> str:
    computed = table.compute(rows)
    names = list(computed[0])
    signs = ["--:" if isinstance(value, float | int) else "---" for value in computed[0].values()]
    lines = [names, signs, *([_cell(row[name]) for name in names] for row in computed)]
    text = "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
    return f"\n**Table.** {table.caption}\n\n{text}"


def _claim(finding: Finding) -> str:
    claim, values = finding.claim, finding.values
    unit = f" {claim.unit}" if claim.unit else ""
    measured = format_number(sum(values) / len(values))
    if len(values) > 1:
        measured += f" [{format_number(min(values))}, {format_number(max(values))}]"
    verdict = "holds" if finding.holds else "**DOES NOT HOLD**"
    text = f"`{claim.name}` {claim.text}"
    cells = (text, claim.source, format_bound(claim) + unit, measured + unit, verdict)
    return f"| {' | '.join(map(_cell, cells))} |\n"


def _cell(value: Value) -> str:
    """Return a value as text of a table's cell."""
    text = value if isinstance(value, str) else format_number(float(value))
    return re.sub(r"(?<!\\)\|", r"\|", text)


def _mutations(rows: Rows) -> str:
    """Return the table of faults, each with the studies and claims that find it."""
    known = {mutation.name: (mutation.breaks, mutation.what) for mutation in MUTATIONS}
    known[UNCHANGED] = ("", "Nothing is changed.")
    lines = ["| breaks | fault | study and the claims that fail |\n|---|---|---|\n"]
    for name, group in groupby(rows, lambda row: str(row["mutation"])):
        finds, errors = [], []
        for row in group:
            study = f"[{row['study']}](#{row['study']})"
            if row["failed"]:
                claims = (f"`{claim}`" for claim in str(row["failed"]).split())
                finds.append(f"{study}: {', '.join(claims)}")
            elif row["error"]:
                errors.append(f"{study}: no result ({row['error']})")
        if not finds:
            finds = ["none" if name == UNCHANGED else "**NOT FOUND**"]
        text = "<br>".join([*finds, *errors])
        breaks, what = known[name]
        lines.append(f"| {breaks} | {what} | {_cell(text)} |\n")
    lines.append("\n[All runs](evidence/mutations.csv), those without a find included.\n")
    return "".join(lines)


@click.command(help="Write docs/evidence.md and its pictures from the rows of the studies.")
@click.option("--rows", type=click.Path(path_type=Path), default=csv_rows.FOLDER)
@click.option("--docs", type=click.Path(path_type=Path), default=DOCS)
def main(rows: Path, docs: Path) -> None:
    """Write the page and the pictures."""
    text = page(rows)
    write_pictures(rows, docs)
    (docs / PAGE.name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
