"""No page, message or comment has a phrase that a reader of the field would have to translate."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "mlx_dpo": (".py", ".html", ".txt"),
    "scripts": (".py", ".sh", ""),
    "docs": (".md",),
    "examples": (".py", ".md", ".yaml"),
    ".github": (".yml", ".md"),
}
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "models/README.md")
FILES = [ROOT / name for name in PAGES] + [
    path
    for folder, endings in FOLDERS.items()
    for path in sorted((ROOT / folder).rglob("*"))
    if path.is_file() and path.suffix in endings and "__pycache__" not in path.parts
]

# Words and turns that are archaic, or stand for a term of the field. Each is a regular expression;
# a word with a technical meaning has a pattern for its other meaning alone.
WORDS = {
    "learned": r"learnt",
    "correctly": r"rightly",
    "fix, repair": r"mend(s|ed|ing)?",
    "next to, with": r"beside",
    "the same, equally": r"alike",
    "instead of": r"in place of",
    "has only": r"(has|have|be read) but (one|once)",
    "one after another": r"behind one another",
    "again": r"anew|afresh",
    "printed, logged": r"told|heard",
    "printed, reported": r"(?<!judge what )(is|are|be|was|were) said(?! to)",
    "a person": r"whoever|nobody (sees|is there|else|but)",
    "verified against": r"held against",
    "continue, resume": r"go(es)? on (with|where|without|from|to)|to go on",
    "because": r"[,;] for (they|it|there|he|she|who|which) (is|are|was|has|have|can|run)",
    "does not exist": r"is there already|which is gone",
    "is not a": r"(?<!there )is no (multiple|number|file|object|list|function|program"
    r"|folder|token id)\b",
    "per token": r"(nats|bytes|tokens|(?<!which )pairs|rows|steps|answers|passes|seconds)"
    r" an? (token|row|pair|step|answer|round|second|layer|pass|epoch)",
    "dtype": r"number types?",
    "dequantized": r"held (unpacked|in float|in bfloat)",
    "context length": r"(model|it) places( no| so)?|places (no more|so many)",
    "likely": r"likeliest",
}
# Fragments of sentences that readers stumbled on.
PHRASES = """
what can be made small|what is made small|what references said|what the reference said
curves, as a page and a picture|both beside each other|both behind openai|measured beside
what it is, how well, how to use|every file is searched first|at the toss of a coin
in one of yours after|found and used by itself|of which little is|of some million weights
adapters come off and on|so that one sees|as a person, a reward function or a judge model finds
are known by their shape|packed or not|weighs them|nobody's answer can end
is proved on the tokens|counted and said|what is lost, odd or wrong
when there is no more to gain|computes rightly|is asked about every pair|costs time alone
ask none|small models bear|can be had before|nothing of it is a formula|drawn out to all
where room is not to spare|of the three that decides the result|what is measured and what is not
pull back to the reference|what moves the weights|minds that chosen|what keeps the policy near
between forward (0) and reverse|taken to be flipped|what is more than this|the last so many
steps in which it rises|taken off beside|; 0 leaves it|what gives way
send metrics to this program|to no program any more|spread of the choice|seed of the choice
drawn anew|think first that can|tokens of this total|as many as the model|is going to need
draw what became of|drawn as far as it is|the folder appears whole|the delicate ones
bring the adapter|for everybody to see|that training is right|as rightly|not whole in the hub
dataset that the hub gives|kind of file is not read|name another place
no pair left (it holds none|a single judged answer|who judges is missing|use nothing: they
which is how often|they go through --micro-batch-size|length alone tells|not looked for
nobody sees them|equal to the plain scorer on a probe|passes of up to|fills as runs are made
nothing is kept yet|have this system message from here on|question and its answer back
batches count alike|asks nothing of the network|judged at|rooms and floors|the way of the data
of many pairs none is held|does a machine give wrong|nothing has to be installed but
hears rows in|a runtimeerror is around|have no place of their own|cannot move; take
chooses among experts|dora stretches|for which mlx-lm has no room|no adapter is known for
is another one (|leads to itself|names no stop token
"""
FRAGMENTS = [part for line in PHRASES.strip().splitlines() for part in line.split("|")]


def plain_text(source: str) -> str:
    """Return a source text with its lines, and the parts of its string literals, joined."""
    joined = re.sub(r"""(["'])[ \t]*\n[ \t]*[frb]?\1""", " ", source)
    joined = re.sub(r"\n[ \t]*(#:?|\*|>)?[ \t]*", " ", joined)
    return re.sub(r"[ \t]+", " ", joined)


def findings(text: str) -> list[str]:
    """Return the phrases in a text, each with what to write instead."""
    text = plain_text(text).lower()
    found = [
        f"…{text[max(0, match.start() - 40) : match.end() + 30]}… (write: {better})"
        for better, pattern in WORDS.items()
        for match in re.finditer(rf"\b({pattern})\b", text)
    ]
    return found + [fragment for fragment in FRAGMENTS if fragment in text]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Little is learnt.", 1),
        ("the margin is 0.5 nats a token", 1),
        ("the margin is 0.5 nats per token; a token is", 0),
        ('"what is "\n    f"made small"', 1),
        ("# what references\n# said of pairs", 1),
        ("it amends a recommended setting", 0),
        ("x.py: is no file", 1),
        ("a sentence that is said to be plain", 0),
    ],
)
def test_a_phrase_is_found_across_lines_and_literals(text, count):
    assert len(findings(text)) == count


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_has_a_phrase_that_readers_stumbled_on(path):
    assert findings(path.read_text(encoding="utf-8")) == []
