"""The page of a comparison: one file, nothing from elsewhere, text that stays text."""

import re
from html.parser import HTMLParser

import pytest

from mlx_dpo.reporting.compare_page import Answer, Table, page
from mlx_dpo.reporting.html import shade

EVIL = '<script>alert(1)</script><img src=x onerror=alert(2)> & "it\'s"'
TABLE = Table(
    title=f"compare {EVIL}",
    notes=[f"note {EVIL}"],
    names=[f"base {EVIL}", "aligned"],
    prompts=[[("system", EVIL), ("user", EVIL)]],
    rows=[[Answer([(EVIL, 0.7), (" so", -2.5), (".", 0.0)], -0.2), Answer([("Yes", 0.05)], None)]],
    figures=[{"tokens": "3"}, {"tokens": "1"}],
)


class Read(HTMLParser):
    """What a browser would make of the page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.spans, self._open, self.texts = [], [], [], []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] == "span":
            self.spans.append((data, self.tags[-1][1]))
        if self._open and self._open[-1] != "style":
            self.texts.append(data)


def test_whatever_was_said_stands_in_the_page_as_text():
    read = Read(page(TABLE))
    assert {tag for tag, _ in read.tags} == {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "div", "small", "br",
        "figure", "figcaption", "span", "table", "tr", "th", "td",
    }  # fmt: skip
    assert sum(EVIL in text for text in read.texts) == 8  # title and h1, note, name twice, …


def test_every_bit_carries_its_log_ratio_and_its_shade():
    read = Read(page(TABLE))
    assert read.spans == [
        (EVIL, {"class": "u2", "title": "+0.70"}),
        (" so", {"class": "d3", "title": "-2.50"}),
        (".", {"title": "+0.00"}),
        ("∎", {"class": "d1", "title": "-0.20"}),
        ("Yes", {"title": "+0.05"}),
    ]
    assert any("(-2.00 nats)" in text for text in read.texts)  # 0.7 - 2.5 - 0.2
    assert any("(+0.05 nats, cut)" in text for text in read.texts)


def test_the_page_loads_and_runs_nothing():
    read = Read(page(TABLE))
    assert all(not {"src", "href", "onload", "style"} & attrs.keys() for _, attrs in read.tags)
    [policy] = [a["content"] for _, a in read.tags if "http-equiv" in a]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    [style] = re.findall("<style>(.+)</style>", page(TABLE), re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style


@pytest.mark.parametrize(
    ("ratio", "step"),
    [(0.0, 0), (0.09, 0), (-0.09, 0), (0.1, 1), (-0.1, -1), (0.5, 2), (-1.9, -2), (2.0, 3),
     (-50.0, -3)],
)  # fmt: skip
def test_shades_grow_in_three_steps_to_both_sides(ratio, step):
    assert shade(ratio) == step
