"""Text from outside in Markdown, shown as it is: without markup, HTML, images or new lines."""

import re

from mlx_dpo.terminal_text import escape_controls, escape_line

MARKUP = re.compile(r"([\\*_{}\[\]<>|~$#!&`])")
MARKUP_AROUND_CODE = re.compile(r"([\\*{}\[\]<>|~$#!&])")


def escape_markdown(text: str, *, keep_code: bool = False) -> str:
    """Return a text on one line, with Markdown markup and HTML escaped.

    Args:
        text: the text.
        keep_code: leave backticks and underscores, for a text of ours that quotes names.
    """
    line = escape_line(" ".join(text.split()))
    return (MARKUP_AROUND_CODE if keep_code else MARKUP).sub(r"\\\1", line)


def code_span(text: str) -> str:
    """Return a text on one line as inline code that is valid in a table."""
    line = escape_line(text).replace("|", "\\|")
    fence = "`" * (_longest_run(line) + 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def code_block(text: str) -> str:
    """Return a text as a block of code, in which nothing is markup."""
    shown = escape_controls(text.strip("\n"))
    fence = "`" * max(3, _longest_run(shown) + 1)
    return f"{fence}text\n{shown}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
