"""The compare page: one self-contained file in which all text is escaped."""

import re
from html.parser import HTMLParser

import pytest

from mlx_dpo.reporting.compare_page import (
    Comparison,
    Completion,
    render_compare_page,
    shade_level,
)

HOSTILE = '<script>alert(1)</script><img src=x onerror=alert(2)> & "it\'s" {{ 7 * 7 }} {% if %}'
COMPARISON = Comparison(
    title=f"compare {HOSTILE}",
    notes=[f"note {HOSTILE}"],
    names=[f"base {HOSTILE}", "aligned"],
    prompts=[[("system", HOSTILE), ("user", HOSTILE)]],
    completions=[
        [
            Completion([(HOSTILE, 0.7), (" so", -2.5), (".", 0.0)], -0.2),
            Completion([("Yes", 0.05)], None),
        ]
    ],
    summaries=[{"tokens": "3"}, {"tokens": "1"}],
)


class ParsedPage(HTMLParser):
    """Tags, attributes and texts of a page as a browser parses it."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.spans, self._open, self.texts = [], [], [], []
        self.feed(page)
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


def test_markup_and_template_syntax_in_texts_stay_text():
    parsed = ParsedPage(render_compare_page(COMPARISON))
    assert {tag for tag, _ in parsed.tags} == {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "div", "small", "br",
        "figure", "figcaption", "span", "table", "tr", "th", "td", "ul", "li", "b",
    }  # fmt: skip
    assert sum(HOSTILE in text for text in parsed.texts) == 8  # title and h1, note, name twice, …


def test_every_span_has_its_log_ratio_and_its_shade():
    parsed = ParsedPage(render_compare_page(COMPARISON))
    assert parsed.spans == [
        (HOSTILE, {"class": "u2", "title": "+0.70 nats"}),
        (" so", {"class": "d3", "title": "-2.50 nats"}),
        (".", {"title": "+0.00 nats"}),
        ("∎", {"class": "d1", "title": "-0.20 nats"}),
        ("Yes", {"title": "+0.05 nats"}),
    ]
    captions = [text.strip() for text in parsed.texts if "of the answer" in text]
    assert captions == [
        "log-ratio of the answer -2.00 nats",  # 0.7 - 2.5 - 0.2
        "log-ratio of the answer +0.05 nats; cut at the token limit",
    ]


def test_the_legend_has_a_swatch_of_each_shade_with_its_signed_bounds():
    page = render_compare_page(COMPARISON)
    swatches = re.findall(r'<li(?: class="(..)")?>(.+)</li>', page)
    assert swatches == [
        ("d3", "−2 or less"),
        ("d2", "−2 to −0.5"),
        ("d1", "−0.5 to −0.1"),
        ("", "−0.1 to +0.1"),
        ("u1", "+0.1 to +0.5"),
        ("u2", "+0.5 to +2"),
        ("u3", "+2 or more nats"),
    ]
    assert "log π − log π_ref" in page
    assert "∎ is the stop token" in page


def test_white_space_of_texts_is_kept_and_none_is_added():
    """Prompts and completions are shown with `white-space: pre-wrap`."""
    text = "  two\n\n lines \n"
    page = render_compare_page(
        COMPARISON._replace(
            prompts=[[("user", text)]],
            completions=[[Completion([(text, 0.0), (text, 0.0)], None), Completion([], 0.0)]],
        )
    )
    assert f"<h2><small>user</small> {text}</h2>" in page
    span = f'<span title="+0.00 nats">{text}</span>'
    assert f"<p>{span}{span}</p>" in page
    assert '<p><span title="+0.00 nats">∎</span></p>' in page


def test_the_page_loads_and_runs_nothing():
    page = render_compare_page(COMPARISON)
    parsed = ParsedPage(page)
    assert all(not {"src", "href", "onload", "style"} & attrs.keys() for _, attrs in parsed.tags)
    [policy] = [a["content"] for _, a in parsed.tags if "http-equiv" in a]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    [style] = re.findall("<style>(.+)</style>", page, re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style


@pytest.mark.parametrize(
    ("log_ratio", "level"),
    [(0.0, 0), (0.09, 0), (-0.09, 0), (0.1, 1), (-0.1, -1), (0.5, 2), (-1.9, -2), (2.0, 3),
     (-50.0, -3)],
)  # fmt: skip
def test_shades_have_three_levels_in_each_direction(log_ratio, level):
    assert shade_level(log_ratio) == level
