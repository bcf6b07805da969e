"""Table of the checks on data sets, and the log of what the checks found."""

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from mlx_dpo import errors
from mlx_dpo.data.files import RowLocations

FAULT, REMARK = "fault", "remark"
MODEL, VALID = "--model", "held-out pairs"  # requirements of a check
ROWS, PAIRS = "rows", "pairs"  # units in which findings are counted
LENGTH_BIAS_SHARE = 0.6  # a length-only classifier with this accuracy is a remark


@dataclass(frozen=True)
class Check:
    """A check on a data set: its name, its severity, why a finding matters and what to do."""

    name: str
    severity: str  # `FAULT` or `REMARK`
    why: str
    advice: str
    requires: str = ""  # `MODEL` or `VALID`; "": nothing
    unit: str = PAIRS
    can_drop: bool = True  # `data clean` can drop the rows with this finding

    @property
    def is_fault(self) -> bool:
        """True if findings make `data check --strict` fail and `data clean` drops their rows."""
        return self.severity == FAULT


_DROPPED = "`--bad-pairs drop` passes over them, else training stops there"
CHECKS = {
    rule.name: rule
    for rule in (
        Check("unreadable", FAULT, "training stops at such a row",
              "fix the rows, or name their format (`--schema`, `--column`)", unit=ROWS),
        Check("untrainable", FAULT, "training stops at such a pair",
              "do as the message says", MODEL),
        Check("empty-completion", FAULT, "there is nothing to score", _DROPPED, unit=ROWS),
        Check("same-text", FAULT, "chosen and rejected do not differ, so nothing is preferred",
              _DROPPED, unit=ROWS),
        Check("same-tokens", FAULT, "chosen and rejected differ, but not in what the model sees",
              _DROPPED, MODEL, unit=ROWS),
        Check("diverged", FAULT, "the answers follow different prompts and cannot be compared",
              _DROPPED, unit=ROWS),
        Check("empty-prompt", FAULT, "nothing is asked", _DROPPED, MODEL, unit=ROWS),
        Check("not-text", FAULT, "images, audio and video are not trained on", _DROPPED,
              unit=ROWS),
        Check("template-refused", FAULT, "the chat template does not take such turns",
              "fix the turns or use another model; `--bad-pairs drop` passes over them", MODEL,
              unit=ROWS),
        Check("not-written", FAULT, "the chat template leaves out a part of the conversation, so "
              "the model would be trained on another one",
              "use a model whose template writes it; `--bad-pairs drop` leaves such pairs out",
              MODEL, unit=ROWS),
        Check("prompt-not-prefix", FAULT, "the chat template changes the prompt once a reply "
              "follows, so nothing says where the reply begins",
              "add `--thinking` if the answers hold the model's thoughts; else take a model "
              "whose template keeps the prompt", MODEL),
        Check("no-plain-text", FAULT, "a special token in the text cannot be kept as plain text",
              _DROPPED, MODEL, unit=ROWS),
        Check("no-room", FAULT, "the prompt alone fills `--max-length`",
              "raise `--max-length`, or use `--truncation keep_end`", MODEL, unit=ROWS),
        Check("same-when-cut", FAULT, "the answers differ only after the cut",
              "raise `--max-length`", MODEL, unit=ROWS),
        Check("beyond-context", FAULT, "the model has no places for so many tokens",
              "lower `--max-length` to what the model places", MODEL),
        Check("double-bos", FAULT, "the text begins twice, which the model never sees in use",
              "take the token that begins a text out of the rows", MODEL),
        Check("double-stop", FAULT, "the answer ends twice, so the model learns to go on after "
              "its end", "take the stop token out of the rows, or leave `--chat-template` alone",
              MODEL),
        Check("duplicate-pair", FAULT, "the pair counts more often than it was judged",
              "`data clean` keeps the first of them"),
        Check("contradiction", FAULT, "the same answer is better here and worse there",
              "decide, or let `data clean` drop both"),
        Check("leaked-prompt", FAULT, "the prompt is held out too, so held-out figures flatter",
              "`data clean` drops it from what is trained on", VALID),
        Check("replacement-character", FAULT, "U+FFFD stands where a character was lost",
              "make the file again from its source"),
        Check("mojibake", FAULT, "UTF-8 was read as Latin-1 once, and the model learns to write so",
              "make the file again from its source, or repair it (the library ftfy does)"),
        Check("control-character", FAULT, "nobody sees them, and the model learns to write them",
              "take them out"),
        Check("invisible-character", REMARK, "nobody sees them, and the model learns to write them",
              "take them out, unless they are meant"),
        Check("refusal", REMARK, "the chosen answer is a refusal",
              "keep them only if the model is to refuse"),
        Check("leaked-answer", REMARK, "an answer is held out too, so held-out figures may flatter",
              "look whether the prompts are alike", VALID),
        Check("duplicate-prompt", REMARK, "the prompt counts more often than others",
              "fine where every answer was judged; held-out pairs never share a prompt"),
        Check("both-labels", REMARK, "the prompt has good and bad answers",
              "`--pair-labelled` makes pairs of them"),
        Check("special-token", REMARK, "a special token of the model stands in the text; it is "
              "kept as characters, and acts only with `--chat-template text`",
              "take it out, if a template has been applied before", MODEL),
        Check("unwritten-field", REMARK, "the chat template does not write the field, so the model "
              "never sees it", "nothing, unless the model should see it: then use a model whose "
              "template writes it", MODEL),
        Check("unknown-token", REMARK, "the tokenizer does not have these characters or words, so "
              "the model sees an unknown token or nothing in their place",
              "use a model whose tokenizer has them, or remove them from the data", MODEL),
        Check("missing-stop", REMARK, "the chat template ends an answer without a stop token; "
              "training adds one", "see whether the template is the model's own", MODEL),
        Check("truncated", REMARK, "the row was cut; an answer that was is scored without its end",
              "raise `--max-length`, or choose by `--truncation` what gives way", MODEL),
        Check("too-long", REMARK, "`--truncation drop` leaves it out", "raise `--max-length`",
              MODEL, unit=ROWS),
        Check("tied", REMARK, "answers that are rated alike make no pair", "nothing", unit=ROWS),
        Check("unpaired", REMARK, "there is no answer of the other kind to the same prompt",
              "use `--loss-type kto`, which needs none", unit=ROWS),
        Check("length-bias", REMARK, f"length alone tells {LENGTH_BIAS_SHARE:.0%} "
              "or more of the pairs apart, so the model can learn length in place of what was "
              "preferred",
              "balance the lengths, or use `--ld-alpha` or a loss that normalises by length",
              can_drop=False),
    )
}  # fmt: skip

CHECK_OF_REASON = {  # reason of a `BadPairError` -> name of the check
    errors.EMPTY_COMPLETION: "empty-completion",
    errors.SAME_TEXT: "same-text",
    errors.SAME_TOKENS: "same-tokens",
    errors.DIFFERENT_PROMPTS: "diverged",
    errors.EMPTY_PROMPT: "empty-prompt",
    errors.NO_ROOM: "no-room",
    errors.SAME_AFTER_TRUNCATION: "same-when-cut",
    errors.TOO_LONG: "too-long",
    errors.NOT_TEXT: "not-text",
    errors.TIED: "tied",
    errors.UNPAIRED: "unpaired",
    errors.TEMPLATE_ERROR: "template-refused",
    errors.NOT_WRITTEN: "not-written",
    errors.SPECIAL_TOKEN: "no-plain-text",
}


MAX_DETAILS = 50  # distinct details per check; further ones are counted together
OTHER_DETAILS = "others"


class FindingLog:
    """Locations and details of everything that the checks found, in the order of `add` calls."""

    def __init__(self, row_locations: RowLocations) -> None:
        self.row_locations = row_locations
        self.details: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._indices: defaultdict[str, array[int]] = defaultdict(lambda: array("q"))
        self._related: defaultdict[str, array[int]] = defaultdict(lambda: array("q"))

    def add(self, check: str, index: int, *, related: int = -1, detail: str = "") -> None:
        """Add a finding of the check named `check`.

        Args:
            check: name of the check, a key of `CHECKS`.
            index: index of the finding's location in `row_locations`.
            related: index of a related location, such as the first of two duplicates; -1: none.
            detail: what exactly was found, such as an error message.
        """
        self._indices[check].append(index)
        self._related[check].append(related)
        if detail:
            self.add_detail(check, detail)

    def add_detail(self, check: str, detail: str) -> None:
        """Count one occurrence of a detail, such as an error message, for a check."""
        counts = self.details[check]
        counts[detail if detail in counts or len(counts) < MAX_DETAILS else OTHER_DETAILS] += 1

    def count(self, check: str) -> int:
        """Return the number of findings of a check."""
        return len(self._indices[check]) if check in self._indices else 0

    def locations(self, check: str) -> Iterator[tuple[str, str | None]]:
        """Yield the location of each finding of a check, with its related location or None."""
        indices, related = self._indices.get(check, ()), self._related.get(check, ())
        for index, other in zip(indices, related, strict=True):
            yield self.row_locations[index], None if other < 0 else self.row_locations[other]
