"""A comparison as one HTML page that needs nothing else, neither files nor the network."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from mlx_dpo.reporting.html import END, LEGEND, document, shade

STYLE = """
:root { color-scheme: light dark; --up: 0, 110, 230; --down: 235, 120, 0; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; white-space: pre-wrap; margin: 2rem 0 .5rem; }
h2 small, .note, figcaption { font-weight: normal; opacity: .7; }
.row { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); }
figure { margin: 0; border: 1px solid rgba(128, 128, 128, .4); border-radius: .4rem;
  padding: .6rem .8rem; }
figure p { margin: .3rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.u1 { background: rgba(var(--up), .15); } .u2 { background: rgba(var(--up), .32); }
.u3 { background: rgba(var(--up), .55); } .d1 { background: rgba(var(--down), .15); }
.d2 { background: rgba(var(--down), .32); } .d3 { background: rgba(var(--down), .55); }
.d2, .d3 { text-decoration: underline; } .u2, .u3 { font-weight: 600; }
table { border-collapse: collapse; margin-top: 2.5rem; }
th, td { padding: .2rem .9rem .2rem 0; text-align: right; } th:first-child { text-align: left; }
"""


class Answer(NamedTuple):
    """One cell: bits of text, each with its log-ratio, and that of the end; None where cut."""

    bits: Sequence[tuple[str, float]]
    end: float | None


class Table(NamedTuple):
    """What the page shows; rows go with prompts, cells and figures with names."""

    title: str
    notes: Sequence[str]
    names: Sequence[str]
    prompts: Sequence[Sequence[tuple[str, str]]]  # role and text of each turn
    rows: Sequence[Sequence[Answer]]
    figures: Sequence[Mapping[str, str]]


def page(table: Table) -> str:
    """The page. Whatever a model, a person or a file said stands in it as text."""
    rows = "".join(
        _prompt(prompt) + '<div class="row">' + "".join(map(_cell, table.names, row)) + "</div>\n"
        for prompt, row in zip(table.prompts, table.rows, strict=True)
    )
    notes = "".join(f'<p class="note">{escape(note)}</p>\n' for note in table.notes)
    legend = f'<p class="note">{escape(LEGEND)}</p>\n'
    return document(table.title, STYLE, notes + legend + rows + _figures(table))


def _prompt(turns: Sequence[tuple[str, str]]) -> str:
    said = "<br>".join(f"<small>{escape(role)}</small> {escape(text)}" for role, text in turns)
    return f"<h2>{said}</h2>\n"


def _cell(name: str, answer: Answer) -> str:
    end = [] if answer.end is None else [(END, answer.end)]
    bits = "".join(_bit(text, ratio) for text, ratio in [*answer.bits, *end])
    total = sum(ratio for _, ratio in [*answer.bits, *end])
    cut = "" if end else ", cut"
    return (
        f"<figure><figcaption>{escape(name)} ({total:+.2f} nats{cut})</figcaption>"
        f"<p>{bits}</p></figure>"
    )


def _bit(text: str, ratio: float) -> str:
    step = shade(ratio)
    name = "" if not step else f' class="{"u" if step > 0 else "d"}{abs(step)}"'
    return f'<span{name} title="{ratio:+.2f}">{escape(text)}</span>'


def _figures(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.names)
    body = "".join(
        f"<tr><th>{escape(label)}</th>"
        + "".join(f"<td>{escape(figures[label])}</td>" for figures in table.figures)
        + "</tr>\n"
        for label in table.figures[0]
    )
    return f"<table>\n<tr><th></th>{head}</tr>\n{body}</table>\n"
