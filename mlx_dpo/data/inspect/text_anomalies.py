"""What single texts may hold that nobody meant: characters, refusals. Text in, names out."""

import re
from collections.abc import Iterable, Iterator

# Line feed, tab and carriage return are meant.
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
REPLACEMENT = re.compile("\ufffd")
# Joiners belong to emoji and to many scripts; between Latin letters they are debris.
INVISIBLE = re.compile(
    "[\u00ad\u200b\u2060-\u2064\u202a-\u202e\u2066-\u2069\ufeff]|(?<=[!-~])[\u200c\u200d](?=[!-~])"
)
# UTF-8 of Latin letters, of typographic signs and of emoji, read as Latin-1 or Windows-1252. Signs
# that may follow a capital letter in good text (quotes, dashes) are left out.
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

REFUSALS = (  # with which an answer begins
    "i cannot", "i can't", "i can not", "i am unable to", "i'm unable to", "i am not able to",
    "i'm not able to", "i won't be able", "i must decline",
    "sorry, but i", "i'm sorry, but", "i'm sorry, i can", "i am sorry, but", "i apologize, but",
    "unfortunately, i can", "as an ai", "as a language model", "as a large language model",
    "as an artificial intelligence",
)  # fmt: skip
MACHINES = ("as an ai language model", "as an ai assistant", "i'm just an ai", "i am just an ai")
_BEGINS = re.compile(rf"\W*({'|'.join(map(re.escape, REFUSALS))})(?![a-z])")
_HOLDS = re.compile(rf"\b({'|'.join(map(re.escape, MACHINES))})\b")
HEAD = 300  # characters of an answer that are looked at


def unusual(texts: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """The names of findings, each with the characters that were found, as code points."""
    whole = "\n".join(texts)
    looked_for = ["control-character"] if whole.isascii() else CHARACTERS
    for name in looked_for:
        pattern = CHARACTERS[name]
        if found := dict.fromkeys(pattern.findall(whole)):
            yield name, [_code_points(text) for text in found]
            whole = pattern.sub("", whole)  # half of such a sequence is no finding of its own


def refusal(answer: str) -> str | None:
    """The phrase by which an answer is taken for a refusal."""
    head = answer[:HEAD].replace("’", "'").lower()
    found = _BEGINS.match(head) or _HOLDS.search(head)
    return found[1] if found else None


def _code_points(text: str) -> str:
    codes = " ".join(f"U+{ord(character):04X}" for character in text)
    return f"{codes} ({text})" if text.isprintable() else codes
