"""Runs as one HTML page that needs nothing else: figures, curves, and what was set otherwise."""

from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple

from mlx_dpo.reporting import plots as drawing
from mlx_dpo.reporting.curves import MOST, Chart, Line
from mlx_dpo.reporting.html import document
from mlx_dpo.reporting.plots import MARKS

STYLE = f"""
:root {{ color-scheme: light dark; --paper: {drawing.LIGHT.paper}; --ink: {drawing.LIGHT.ink};
  --faint: {drawing.LIGHT.faint}; }}
@media (prefers-color-scheme: dark) {{ :root {{ --paper: {drawing.DARK.paper};
  --ink: {drawing.DARK.ink}; --faint: {drawing.DARK.faint}; }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem;
  padding: 0 1rem; background: var(--paper); color: var(--ink); }}
h1 {{ font-size: 1.3rem; }} h2 {{ font-size: 1.05rem; margin: 2rem 0 .5rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .25rem .9rem .25rem 0; text-align: right; vertical-align: bottom;
  border-bottom: 1px solid var(--faint); }}
th:first-child, .facts td {{ text-align: left; }}
.facts th, .facts td {{ vertical-align: top; }} .facts td {{ overflow-wrap: anywhere; }}
.facts th {{ white-space: nowrap; }}
.charts {{ display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); }}
figure {{ margin: 0; }} figcaption, .note {{ opacity: .75; font-size: .9rem; }}
.charts img {{ width: 100%; height: auto; }} .legend img {{ max-width: 100%; }}
"""

THEMES = (drawing.LIGHT, drawing.DARK)


class Told(NamedTuple):
    """What is said of one run beside its curves."""

    name: str
    facts: Sequence[tuple[str, str]]
    figures: Mapping[str, str]  # label: value, in the order they are shown
    warnings: Sequence[str]


def run_page(runs: Sequence[Told], charts: Sequence[Chart], along: str) -> str:
    """The page of one run or of several; whatever a person or a file said stands in it as text."""
    names = [run.name for run in runs]
    legend = _picture([drawing.legend(charts, names, t) for t in THEMES], ", ".join(names))
    body = [
        f'<div class="wide">{_figures(runs)}</div>\n',
        f'<h2>Curves</h2>\n<p class="note">{escape(_note(charts))}</p>\n',
        f'<p class="legend">{legend}</p>\n',
        '<div class="charts">\n',
        *(_chart(chart, names, along) for chart in charts),
        "</div>\n",
        *(_facts(run, alone=len(runs) == 1) for run in runs),
    ]
    return document(", ".join(names), STYLE, "".join(body), pictures=True)


def _figures(runs: Sequence[Told]) -> str:
    labels = list(dict.fromkeys(label for run in runs for label in run.figures))
    head = "".join(f"<th>{escape(label)}</th>" for label in labels)
    rows = "".join(
        f"<tr><th>{escape(run.name)}</th>"
        + "".join(f"<td>{escape(run.figures.get(label, ''))}</td>" for label in labels)
        + "</tr>\n"
        for run in runs
    )
    return f"<table>\n<tr><th>on held-out pairs</th>{head}</tr>\n{rows}</table>\n"


def _note(charts: Sequence[Chart]) -> str:
    said = ["Dotted: where the reference itself would be, or a coin."]
    drawn = [line for chart in charts for line in chart.lines]
    if any(line.mean != line.y for line in drawn):
        said.append("Faint: each step; strong: the mean of it and of those before it.")
    if any(line.is_thinned for line in drawn):
        said.append(f"Of more than {MOST} steps, neighbours are one, their mean.")
    if len({line.run for line in drawn}) > len(MARKS):
        said.append(f"Marks repeat after {len(MARKS)} runs, then in other colours.")
    return " ".join(said)


def _chart(chart: Chart, names: Sequence[str], along: str) -> str:
    pictures = [drawing.svg(chart, len(names), along, theme) for theme in THEMES]
    said = ". ".join(_in_words(chart, names))
    return (
        f"<figure>{_picture(pictures, f'{chart.title}. {said}')}"
        f"<figcaption>{escape(chart.title)}: {escape(chart.meaning)}</figcaption></figure>\n"
    )


def _in_words(chart: Chart, names: Sequence[str]) -> Iterator[str]:
    """What a picture shows, for those who cannot see it."""
    for line in chart.lines:
        of = [names[line.run], line.part, "held out" * line.held_out]
        yield f"{', '.join(filter(None, of))}: from {_value(line, 0)} to {_value(line, -1)}"


def _value(line: Line, place: int) -> str:
    return f"{line.mean[place]:.4g}"


def _picture(pictures: Sequence[bytes], said: str) -> str:
    light, dark = (f"data:image/svg+xml;base64,{b64encode(p).decode()}" for p in pictures)
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(said)}"></picture>'
    )


def _facts(run: Told, *, alone: bool) -> str:
    title = "The run" if alone else run.name
    warned = [("warning", said) for said in run.warnings]
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>\n"
        for name, text in [*run.facts, *warned]
    )
    return f'<h2>{escape(title)}</h2>\n<table class="facts">\n{rows}</table>\n'
