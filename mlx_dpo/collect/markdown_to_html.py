"""Render the Markdown of prompts and answers as HTML that loads and runs nothing.

The text is a model's, or comes from a dataset. HTML in it stays text, images are shown as their
source, and links as their text and address, which cannot be clicked.
"""

from collections.abc import Sequence
from html import escape
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token

MAX_CHARACTERS = 20_000  # of a text that is parsed; the time of parsing can grow with its square


class _InertRenderer(RendererHTML):
    """A renderer that writes no attribute but its own classes and the start of a numbered list."""

    def link_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        """Begin the text of a link and remember its address, which follows the text."""
        env.setdefault("addresses", []).append(str(tokens[idx].attrGet("href") or ""))
        return '<span class="link">'

    def link_close(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        """End the text of a link and show its address."""
        address = env["addresses"].pop()
        return f'</span> <span class="address">({escape(address)})</span>'

    @staticmethod
    def renderAttrs(token: Token) -> str:  # noqa: N802 (the name is the base class's)
        """Return the first number of a numbered list; all other attributes are left out."""
        start = token.attrGet("start") if token.type == "ordered_list_open" else None
        return "" if start is None else f' start="{int(start)}"'

    def fence(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        """Return a fenced code block without the name of its language."""
        return f"<pre><code>{escape(tokens[idx].content)}</code></pre>\n"


def _make_parser() -> MarkdownIt:
    parser = MarkdownIt(
        "commonmark", {"html": False, "linkify": False, "breaks": True}, renderer_cls=_InertRenderer
    )
    return parser.enable("table").disable(["image", "html_block", "html_inline", "autolink"])


_PARSER = _make_parser()


def markdown_to_html(text: str) -> str:
    """Return the Markdown `text` as HTML without links, images, scripts or attributes.

    A very long text is returned as preformatted text. Of quotes and lists that are nested deeper
    than 20 levels the inner text is left out; the ranking page can also show the plain text.
    """
    if len(text) > MAX_CHARACTERS:
        return f"<pre>{escape(text)}</pre>"
    return str(_PARSER.render(text))
