r"""Text from outside, shown so that it cannot steer a terminal.

Column names, file names, templates, error texts of the Hub and answers of a model may hold escape
sequences, which move the cursor, rename the window or write to the clipboard, and characters that
reverse the direction of writing. They are shown as visible escapes, such as `\x1b`.
"""

import re

_BIDI = "\u202a-\u202e\u2066-\u2069"  # embeddings, overrides and isolates
_LINE_SEPARATORS = "\u2028\u2029"
_SURROGATES = "\ud800-\udfff"  # half a character, which no output encoding can write
_UNSAFE = rf"\x7f-\x9f{_LINE_SEPARATORS}{_BIDI}{_SURROGATES}"
_UNSAFE_IN_TEXT = re.compile(rf"[\x00-\x08\x0b-\x1f{_UNSAFE}]")
_UNSAFE_IN_LINE = re.compile(rf"[\x00-\x1f{_UNSAFE}]")
_UNSAFE_IN_JSON = re.compile(rf"[{_UNSAFE}]")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060-\u2065\ufeff]")
_NAMES = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


def escape_controls(text: str) -> str:
    """Return `text` with its control characters visible; newlines and tabs stay."""
    return _UNSAFE_IN_TEXT.sub(_escape, text)


def escape_line(text: str) -> str:
    """Return `text` as one line, with its control characters, newlines and tabs visible."""
    return _UNSAFE_IN_LINE.sub(_escape, text)


def escape_invisible(text: str) -> str:
    """Return `text` with its control characters and its characters without width visible."""
    return _INVISIBLE.sub(_escape, escape_controls(text))


def escape_json(document: str) -> str:
    """Return a JSON document in which control characters are JSON escapes; its value is the same.

    Args:
        document: the output of `json.dumps`, in which those below U+0020 are escaped already.
    """
    return _UNSAFE_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", document)


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    if character in _NAMES:
        return _NAMES[character]
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
