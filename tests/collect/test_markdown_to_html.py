"""Markdown of models as HTML that loads nothing, runs nothing and links nowhere."""

from html.parser import HTMLParser

import pytest

from mlx_dpo.collect.markdown_to_html import markdown_to_html

INERT = {"p", "br", "em", "strong", "code", "pre", "blockquote", "ul", "ol", "li", "hr", "h1", "h2",
         "span", "table", "thead", "tbody", "tr", "th", "td"}  # fmt: skip


class Elements(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= set(attrs)

    def handle_data(self, data):
        self.text += data


def test_markdown_is_rendered():
    page = markdown_to_html("# Title\n**bold** `x < y`\n\n```python\nif a < b:\n```\n3. third")
    assert page == (
        "<h1>Title</h1>\n<p><strong>bold</strong> <code>x &lt; y</code></p>\n"
        '<pre><code>if a &lt; b:\n</code></pre>\n<ol start="3">\n<li>third</li>\n</ol>\n'
    )
    assert markdown_to_html("one\ntwo") == "<p>one<br />\ntwo</p>\n"


@pytest.mark.parametrize(
    "text",
    [
        "[x](javascript:alert(1))",
        "[x](data:text/html,<script>alert(1)</script>)",
        "[x](JaVaScRiPt:alert(1) 'title')",
        '[x](https://evil.example/"onclick="alert(1))',
        "![x](https://evil.example/x.png)",
        "[![x](https://evil.example/x.png)](https://evil.example)",
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "<div onclick=alert(1)>\n\n# text\n\n</div>",
        "<https://evil.example>",
        "<!-- --><style>body { display: none }</style>",
        '```"><script>alert(1)</script>\ncode\n```',
        "[x]: https://evil.example\n\n[x] [y][x]",
        "| a |\n|:-:|\n| <b>x</b> |",
        "&lt;script&gt;alert(1)&lt;/script&gt;",
        "\x00\x1b]0;title\x07 \u202e",
    ],
)
def test_hostile_markdown_is_inert(text):
    elements = Elements(markdown_to_html(text))
    assert elements.tags <= INERT
    assert elements.attributes <= {("class", "link"), ("class", "address")}


def test_a_link_shows_its_address_as_text():
    elements = Elements(markdown_to_html("see [the page](https://example.org/a?b=1&c=2)"))
    assert elements.text.strip() == "see the page (https://example.org/a?b=1&c=2)"


@pytest.mark.parametrize(
    "text",
    [">" * 5000 + "x", "- " * 3000 + "x", "[" * 5000, "**" * 5000 + "x", "[a](" * 2500,
     "`" * 9999, "<" * 9999, "x" * 200_000],
)  # fmt: skip
def test_huge_nesting_ends(text):
    elements = Elements(markdown_to_html(text))
    assert elements.tags <= INERT
    assert not elements.attributes


def test_a_very_long_text_is_shown_as_it_is():
    assert markdown_to_html("*a* <" * 10_000) == f"<pre>{'*a* &lt;' * 10_000}</pre>"
