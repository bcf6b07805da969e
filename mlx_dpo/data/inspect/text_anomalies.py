"""Find odd characters in texts."""

import re
from collections.abc import Iterable, Iterator

# Line feed, tab and carriage return are legitimate.
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
REPLACEMENT = re.compile("\ufffd")
# Emoji and many scripts need joiners; between Latin letters joiners are debris.
INVISIBLE = re.compile(
    "[\u00ad\u200b\u2060-\u2064\u202a-\u202e\u2066-\u2069\ufeff]|(?<=[!-~])[\u200c\u200d](?=[!-~])"
)
# UTF-8 of Latin letters, of typographic signs and of emoji, decoded as Latin-1 or Windows-1252.
# Signs that may follow a capital letter in correct text (quotes, dashes) are left out.
MOJIBAKE = re.compile(
    "[ÂÃ][\u0080-\u00bf€ƒ†‡ˆŠŒŽšœžŸ˜™]"
    "|â(?:€[\u0080-\u00bf™œ\u009d˜“”¦¢‹›š]|\u0080[\u0080-\u00bf])"
    "|ð(?:Ÿ|\u009f)|ï(?:»¿|¿½)"
)
CHARACTERS = {
    "mojibake": MOJIBAKE,
    "replacement-character": REPLACEMENT,
    "control-character": CONTROL,
    "invisible-character": INVISIBLE,
}


def find_odd_characters(texts: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield the name of each kind of odd character in the texts, with its code points."""
    text = "\n".join(texts)
    names = ["control-character"] if text.isascii() else CHARACTERS
    for name in names:
        pattern = CHARACTERS[name]
        if matches := dict.fromkeys(pattern.findall(text)):
            yield name, [_format_code_points(match) for match in matches]
            text = pattern.sub("", text)  # half of such a sequence is no finding of its own


def _format_code_points(text: str) -> str:
    codes = " ".join(f"U+{ord(character):04X}" for character in text)
    return f"{codes} ({text})" if text.isprintable() else codes
