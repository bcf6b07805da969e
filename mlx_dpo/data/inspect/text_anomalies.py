"""Find odd characters and refusals in texts."""

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

AI_PHRASES = ("as an ai language model", "as an ai assistant", "i'm just an ai", "i am just an ai")
REFUSALS = (  # phrases and regular expressions that begin a refusal
    "i cannot", "i can't", "i can not", "i am unable to", "i'm unable to", "i am not able to",
    "i'm not able to", "i won't be able", "i must decline",
    "sorry, but i", "i'm sorry, but", "i'm sorry, i can", "i am sorry, but", "i apologize, but",
    "unfortunately, i can", "as an ai", "as a language model", "as a large language model",
    "as an artificial intelligence",
    "i(?:'m| am) (?:sorry|afraid),? (?:but |that )*(?:i|this|that)", "i won't", "i will not",
    "i(?:'m| am) (?:unable|not able)", "i(?:'m| am) an? (?:ai|language model)",
)  # fmt: skip
_SENTENCE_START = re.compile(rf"(?:^|[.!?\n])\W*({'|'.join((*AI_PHRASES, *REFUSALS))})(?![a-z])")
_ANYWHERE = re.compile(rf"\b({'|'.join(AI_PHRASES)})\b")
SENTENCE_CHARACTERS = 80  # characters of the text that are searched for `REFUSALS`
AI_CHARACTERS = 300  # characters of the text that are searched for `AI_PHRASES`


def find_odd_characters(texts: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield the name of each kind of odd character in the texts, with its code points."""
    text = "\n".join(texts)
    names = ["control-character"] if text.isascii() else CHARACTERS
    for name in names:
        pattern = CHARACTERS[name]
        if matches := dict.fromkeys(pattern.findall(text)):
            yield name, [_format_code_points(match) for match in matches]
            text = pattern.sub("", text)  # half of such a sequence is no finding of its own


def find_refusal(text: str) -> str | None:
    """Return the English phrase that marks the text as a refusal; None if it is not a refusal.

    A text is a refusal if a sentence near its beginning starts with one of `REFUSALS`, or if one
    of `AI_PHRASES` is near its beginning.
    """
    start = text[:AI_CHARACTERS].replace("’", "'").lower()
    match = _SENTENCE_START.search(start[:SENTENCE_CHARACTERS]) or _ANYWHERE.search(start)
    return match[1] if match else None


def _format_code_points(text: str) -> str:
    codes = " ".join(f"U+{ord(character):04X}" for character in text)
    return f"{codes} ({text})" if text.isprintable() else codes
