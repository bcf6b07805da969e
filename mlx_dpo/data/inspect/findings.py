"""Every finding that there may be: its name, whether it is a fault, why it matters, what to do."""

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from mlx_dpo import errors as faults
from mlx_dpo.data.files import RowLocations

FAULT, REMARK = "fault", "remark"
MODEL, VALID = "--model", "held-out pairs"  # what it takes to look for a finding
ROWS, PAIRS = "rows", "pairs"  # what is counted
TELLING = 0.6  # share of pairs that length tells apart, from which on it is a remark


@dataclass(frozen=True)
class Rule:
    """A kind of finding."""

    name: str
    kind: str
    why: str
    mend: str
    needs: str = ""  # what it takes to be looked for
    counts: str = PAIRS
    drops: bool = True  # whether `data clean` can leave such rows out

    @property
    def fault(self) -> bool:
        """Whether `--strict` stops at it, and `data clean` drops it unasked."""
        return self.kind == FAULT


_DROPPED = "`--bad-pairs drop` passes over them, else training stops there"
RULES = {
    rule.name: rule
    for rule in (
        Rule("unreadable", FAULT, "training stops at such a row",
             "mend the rows, or say how they are written (`--schema`, `--column`)", counts=ROWS),
        Rule("untrainable", FAULT, "training stops at such a pair",
             "do as the message says", MODEL),
        Rule("empty-completion", FAULT, "there is nothing to score", _DROPPED, counts=ROWS),
        Rule("same-text", FAULT, "chosen and rejected do not differ, so nothing is preferred",
             _DROPPED, counts=ROWS),
        Rule("same-tokens", FAULT, "chosen and rejected differ, but not in what the model sees",
             _DROPPED, MODEL, counts=ROWS),
        Rule("diverged", FAULT, "the answers follow different prompts and cannot be compared",
             _DROPPED, counts=ROWS),
        Rule("empty-prompt", FAULT, "nothing is asked", _DROPPED, MODEL, counts=ROWS),
        Rule("not-text", FAULT, "images, audio and video are not trained on", _DROPPED,
             counts=ROWS),
        Rule("template-refused", FAULT, "the chat template does not take such turns",
             "mend the turns or take another model; `--bad-pairs drop` passes over them", MODEL,
             counts=ROWS),
        Rule("prompt-not-prefix", FAULT, "the chat template changes the prompt once a reply "
             "follows, so nothing says where the reply begins",
             "take a model whose template keeps the prompt", MODEL),
        Rule("no-plain-text", FAULT, "a special token in the text cannot be kept as plain text",
             _DROPPED, MODEL, counts=ROWS),
        Rule("no-room", FAULT, "the prompt alone fills `--max-length`",
             "raise `--max-length`, or use `--truncation keep_end`", MODEL, counts=ROWS),
        Rule("same-when-cut", FAULT, "the answers differ only after the cut",
             "raise `--max-length`", MODEL, counts=ROWS),
        Rule("beyond-context", FAULT, "the model has no places for so many tokens",
             "lower `--max-length` to what the model places", MODEL),
        Rule("double-bos", FAULT, "the text begins twice, which the model never sees in use",
             "take the token that begins a text out of the rows", MODEL),
        Rule("double-stop", FAULT, "the answer ends twice, so the model learns to go on after "
             "its end", "take the stop token out of the rows, or leave `--chat-template` alone",
             MODEL),
        Rule("duplicate-pair", FAULT, "the pair counts more often than it was judged",
             "`data clean` keeps the first of them"),
        Rule("contradiction", FAULT, "the same answer is better here and worse there",
             "decide, or let `data clean` drop both"),
        Rule("leaked-prompt", FAULT, "the prompt is held out too, so held-out figures flatter",
             "`data clean` drops it from what is trained on", VALID),
        Rule("replacement-character", FAULT, "U+FFFD stands where a character was lost",
             "make the file again from its source"),
        Rule("mojibake", FAULT, "UTF-8 was read as Latin-1 once, and the model learns to write so",
             "make the file again from its source, or mend it (the library ftfy does)"),
        Rule("control-character", FAULT, "nobody sees them, and the model learns to write them",
             "take them out"),
        Rule("invisible-character", REMARK, "nobody sees them, and the model learns to write them",
             "take them out, unless they are meant"),
        Rule("refusal", REMARK, "the chosen answer is a refusal",
             "keep them only if the model is to refuse"),
        Rule("leaked-answer", REMARK, "an answer is held out too, so held-out figures may flatter",
             "look whether the prompts are alike", VALID),
        Rule("duplicate-prompt", REMARK, "the prompt counts more often than others",
             "fine where every answer was judged; held-out pairs never share a prompt"),
        Rule("both-labels", REMARK, "the prompt has good and bad answers",
             "`--pair-labelled` makes pairs of them"),
        Rule("special-token", REMARK, "a special token of the model stands in the text; it is "
             "kept as characters, and acts only with `--chat-template text`",
             "take it out, if a template has been applied before", MODEL),
        Rule("missing-stop", REMARK, "the chat template ends an answer without a stop token; "
             "training adds one", "see whether the template is the model's own", MODEL),
        Rule("truncated", REMARK, "the row was cut; an answer that was is scored without its end",
             "raise `--max-length`, or choose by `--truncation` what gives way", MODEL),
        Rule("too-long", REMARK, "`--truncation drop` leaves it out", "raise `--max-length`",
             MODEL, counts=ROWS),
        Rule("tied", REMARK, "answers that are rated alike make no pair", "nothing", counts=ROWS),
        Rule("unpaired", REMARK, "there is no answer of the other kind to the same prompt",
             "use `--loss-type kto`, which needs none", counts=ROWS),
        Rule("length-bias", REMARK, f"length alone tells {TELLING:.0%} or more of the pairs "
             "apart, so the model can learn length in place of what was preferred",
             "balance the lengths, or use `--ld-alpha` or a loss that normalises by length",
             drops=False),
    )
}  # fmt: skip

LOST = {  # the reason of a pair that is left out: the finding
    faults.EMPTY_COMPLETION: "empty-completion",
    faults.SAME_TEXT: "same-text",
    faults.SAME_TOKENS: "same-tokens",
    faults.DIFFERENT_PROMPTS: "diverged",
    faults.EMPTY_PROMPT: "empty-prompt",
    faults.NO_ROOM: "no-room",
    faults.SAME_AFTER_TRUNCATION: "same-when-cut",
    faults.TOO_LONG: "too-long",
    faults.NOT_TEXT: "not-text",
    faults.TIED: "tied",
    faults.UNPAIRED: "unpaired",
    faults.TEMPLATE_ERROR: "template-refused",
    faults.SPECIAL_TOKEN: "no-plain-text",
}


WORDINGS = 50  # different details of one finding that are told apart
OTHERS = "others"


class Hits:
    """The places of every finding, in the order in which they were found."""

    def __init__(self, places: RowLocations) -> None:
        self.places = places
        self.details: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._at: defaultdict[str, array[int]] = defaultdict(lambda: array("q"))
        self._other: defaultdict[str, array[int]] = defaultdict(lambda: array("q"))

    def add(self, rule: str, at: int, *, other: int = -1, detail: str = "") -> None:
        """Something was found at a place; `other` is the one that it goes with."""
        self._at[rule].append(at)
        self._other[rule].append(other)
        if detail:
            self.detail(rule, detail)

    def detail(self, rule: str, detail: str) -> None:
        """What was found there, to be counted."""
        counts = self.details[rule]
        counts[detail if detail in counts or len(counts) < WORDINGS else OTHERS] += 1

    def count(self, rule: str) -> int:
        """How often it was found."""
        return len(self._at[rule]) if rule in self._at else 0

    def where(self, rule: str) -> Iterator[tuple[str, str | None]]:
        """The places, each with the one that it goes with."""
        for at, other in zip(self._at.get(rule, ()), self._other.get(rule, ()), strict=True):
            yield self.places[at], None if other < 0 else self.places[other]
