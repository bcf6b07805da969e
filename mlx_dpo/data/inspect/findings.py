"""Table of the checks on data sets, and the log of what the checks found."""

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from mlx_dpo import errors
from mlx_dpo.data.files import RowLocations

ERROR, WARNING = "error", "warning"
MODEL, VALID = "--model", "held-out pairs"  # requirements of a check
ROWS, PAIRS = "rows", "pairs"  # units in which findings are counted
LENGTH_BIAS_SHARE = 0.6  # a length-only classifier with this accuracy is a warning


@dataclass(frozen=True)
class Check:
    """A check on a data set: its name, its severity, why a finding matters and what to do."""

    name: str
    severity: str  # `ERROR` or `WARNING`
    why: str
    advice: str
    requires: str = ""  # `MODEL` or `VALID`; "": nothing
    unit: str = PAIRS
    advice_at_limit: str = ""  # instead of `advice` if `max_length` is the model's context length
    can_drop: bool = True  # `data clean` can drop the rows with this finding

    @property
    def is_error(self) -> bool:
        """True if findings make `data check --strict` fail and `data clean` drops their rows."""
        return self.severity == ERROR


_DROP = "`--bad-pairs drop` drops such pairs; otherwise training stops there"
KEEP_END = "use `--truncation keep_end`"
CHECKS = {
    rule.name: rule
    for rule in (
        Check("unreadable", ERROR, "training stops at such a row",
              "fix the rows, or name their format (`--schema`, `--column`)", unit=ROWS),
        Check("untrainable", ERROR, "training stops at such a pair",
              "follow the advice in the message", MODEL),
        Check("empty-completion", ERROR, "there is no completion to score", _DROP, unit=ROWS),
        Check("same-text", ERROR, "chosen and rejected are identical, so there is no preference",
              _DROP, unit=ROWS),
        Check("same-tokens", ERROR, "chosen and rejected differ as text, but not as tokens",
              _DROP, MODEL, unit=ROWS),
        Check("different-prompts", ERROR, "the answers follow different prompts and cannot be "
              "compared", _DROP, unit=ROWS),
        Check("empty-prompt", ERROR, "the prompt is empty", _DROP, MODEL, unit=ROWS),
        Check("not-text", ERROR, "images, audio and video are not supported", _DROP,
              unit=ROWS),
        Check("template-refused", ERROR, "the chat template does not accept these turns",
              "fix the turns or use another model; `--bad-pairs drop` drops such pairs", MODEL,
              unit=ROWS),
        Check("template-drops-content", ERROR, "the chat template drops a part of the "
              "conversation, so the model would be trained on a different conversation",
              "use a model whose template includes it; `--bad-pairs drop` drops such pairs",
              MODEL, unit=ROWS),
        Check("prompt-not-prefix", ERROR, "the chat template changes the prompt once a reply "
              "follows, so the start of the reply is unknown",
              "add `--thinking` if the answers contain the model's thoughts; otherwise use a "
              "model whose template keeps the prompt", MODEL),
        Check("active-special-token", ERROR, "a special token in the text cannot be encoded as "
              "plain text", _DROP, MODEL, unit=ROWS),
        Check("prompt-too-long", ERROR, "the prompt alone fills `--max-length`",
              f"{KEEP_END}, or raise `--max-length`", MODEL, unit=ROWS, advice_at_limit=KEEP_END),
        Check("same-after-truncation", ERROR, "the answers differ only in the part that is cut",
              f"{KEEP_END}, or raise `--max-length`", MODEL, unit=ROWS, advice_at_limit=KEEP_END),
        Check("longer-than-context", ERROR, "the pair is longer than the model's context",
              "lower `--max-length` to the model's context length", MODEL),
        Check("double-bos", ERROR, "the text begins with two BOS tokens, which the model never "
              "sees in use", "remove the BOS token from the rows", MODEL),
        Check("double-eos", ERROR, "the answer has two stop tokens, so the model learns to "
              "continue after the first", "remove the stop token from the rows, or do not set "
              "`--chat-template`", MODEL),
        Check("duplicate-pair", ERROR, "repeated pairs count more often than others",
              "`data clean` keeps the first of them"),
        Check("contradiction", ERROR, "the same answer is chosen in one pair and rejected in "
              "another", "decide which is right, or let `data clean` drop both"),
        Check("leaked-prompt", ERROR, "the prompt is also held out, so held-out metrics are too "
              "optimistic", "`data clean` drops the row from the training pairs", VALID),
        Check("replacement-character", ERROR, "U+FFFD marks a character that was lost",
              "create the file again from its source"),
        Check("mojibake", ERROR, "UTF-8 was decoded as Latin-1, and the model would learn to write "
              "such text", "create the file again from its source, or repair it with the library "
              "ftfy"),
        Check("control-character", ERROR, "invisible characters that the model would learn to "
              "write", "remove them"),
        Check("invisible-character", WARNING, "invisible characters that the model would learn to "
              "write", "remove them, unless they are intended"),
        Check("refusal", WARNING, "the chosen answer is a refusal",
              "keep these pairs only if the model should refuse"),
        Check("leaked-answer", WARNING, "an answer is also held out, so held-out metrics may be "
              "too optimistic", "check whether the prompts are similar", VALID),
        Check("duplicate-prompt", WARNING, "repeated prompts count more often than others",
              "fine if their answers differ; held-out pairs never share a prompt with training "
              "pairs"),
        Check("both-labels", WARNING, "the prompt has good and bad answers",
              "`--pair-labelled` makes pairs of them"),
        Check("special-token", WARNING, "the text contains a special token of the model; it is "
              "encoded as plain text, except with `--chat-template text`",
              "remove it if a chat template has already been applied", MODEL),
        Check("template-drops-field", WARNING, "the chat template does not use the field, so the "
              "model never sees it", "nothing, unless the model should see the field: then use a "
              "model whose template includes it", MODEL),
        Check("unknown-token", WARNING, "the tokenizer does not have these characters or words, so "
              "the model sees an unknown token or nothing instead",
              "use a model whose tokenizer has them, or remove them from the data", MODEL),
        Check("missing-eos", WARNING, "the chat template ends an answer without a stop token; "
              "training adds one", "check that the template is the model's own", MODEL),
        Check("truncated", WARNING, "the row is longer than `--max-length` and is cut; a cut "
              "answer is scored without its end",
              "choose with `--truncation` which part is cut, or raise `--max-length`", MODEL,
              advice_at_limit="choose with `--truncation` which part is cut"),
        Check("too-long", WARNING, "`--truncation drop` drops the pair",
              f"{KEEP_END}, or raise `--max-length`", MODEL, unit=ROWS, advice_at_limit=KEEP_END),
        Check("tied", WARNING, "answers with equal ratings make no pair", "nothing", unit=ROWS),
        Check("unpaired", WARNING, "the prompt has no answer with the other label",
              "use `--loss-type kto`, which does not need pairs", unit=ROWS),
        Check("unjudged", WARNING, "nobody has judged the answers",
              "judge them in the tool that exported them, and export again", unit=ROWS),
        Check("length-bias", WARNING, "a length-only classifier would be right on "
              f"{LENGTH_BIAS_SHARE:.0%} of pairs or more, so the model can learn length instead "
              "of the preference",
              "balance the lengths, or use `--ld-alpha` or a loss that normalises by length",
              can_drop=False),
    )
}  # fmt: skip
RENAMED_CHECKS = {  # earlier name -> name
    "not-written": "template-drops-content",
    "unwritten-field": "template-drops-field",
    "diverged": "different-prompts",
    "no-plain-text": "active-special-token",
    "no-room": "prompt-too-long",
    "same-when-cut": "same-after-truncation",
    "beyond-context": "longer-than-context",
    "double-stop": "double-eos",
    "missing-stop": "missing-eos",
}

CHECK_OF_REASON = {  # reason of a `BadPairError` -> name of the check
    errors.EMPTY_COMPLETION: "empty-completion",
    errors.SAME_TEXT: "same-text",
    errors.SAME_TOKENS: "same-tokens",
    errors.DIFFERENT_PROMPTS: "different-prompts",
    errors.EMPTY_PROMPT: "empty-prompt",
    errors.NO_ROOM: "prompt-too-long",
    errors.SAME_AFTER_TRUNCATION: "same-after-truncation",
    errors.TOO_LONG: "too-long",
    errors.NOT_TEXT: "not-text",
    errors.TIED: "tied",
    errors.UNPAIRED: "unpaired",
    errors.UNJUDGED: "unjudged",
    errors.TEMPLATE_ERROR: "template-refused",
    errors.NOT_WRITTEN: "template-drops-content",
    errors.SPECIAL_TOKEN: "active-special-token",
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
