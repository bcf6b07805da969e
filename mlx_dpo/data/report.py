"""What became of a file of pairs: the counts that a person and `run.json` are told."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from mlx_dpo.data.tokenization.tokenize import TokenizedExample

NOT_ADDITIVE = ("max_length", "longest", "per_epoch")  # numbers that do not add up over its rows
COUNTERS = ("schemas", "unused_fields", "specials")
MAX_SHOWN = 3  # places named for each reason; `to_dict` has all of them


@dataclass
class PairsReport:
    """Counts over one file. Pairs, or judged answers, unless another unit is named."""

    source: str
    max_length: int
    judged: bool = False  # whether answers were judged one by one
    read: int = 0
    kept: int = 0
    desirable: int = 0  # of judged answers
    dropped: dict[str, list[str]] = field(default_factory=dict)  # reason: places
    schemas: Counter[str] = field(default_factory=Counter)  # rows by the way they are written
    unused_fields: Counter[str] = field(default_factory=Counter)  # rows that have such a field
    wrapped: int = 0  # strings that became a user and an assistant turn
    dialogues: int = 0  # marked text that became messages
    with_system: int = 0
    as_chat: int = 0
    specials: Counter[str] = field(default_factory=Counter)  # that stand in a text
    with_specials: int = 0
    specials_act: bool = False  # they are what the tokenizer makes of them
    truncated: int = 0
    prompts_cut: int = 0
    completions_cut: int = 0  # their stop tokens are not scored
    boundary_moved: int = 0
    stops_added: int = 0  # completions
    prompt_tokens: int = 0  # once a pair, though two rows hold it
    chosen_tokens: int = 0
    rejected_tokens: int = 0
    longest: int = 0  # tokens of the longest row
    weight: float | None = None  # how often each is used in an epoch, where that was said
    per_epoch: int = 0  # pairs to train on that make up an epoch, where `weight` was said
    origin: str = field(default="", compare=False)  # of the tokens, if there is anything to say

    def drop(self, location: str, reason: str) -> None:
        """Count a pair that is left out."""
        self.dropped.setdefault(reason, []).append(location)

    def keep(self, encoded: TokenizedExample, *, was_text: bool) -> None:
        """Count a pair that is used."""
        pair = encoded.pair
        self.kept += 1
        self.desirable += bool(pair.desirable)
        self.dialogues += encoded.was_dialogue
        self.wrapped += was_text and encoded.as_chat and not encoded.was_dialogue
        self.with_system += encoded.with_system
        self.as_chat += encoded.as_chat
        self.specials.update(encoded.specials)
        self.with_specials += bool(encoded.specials)
        self.truncated += encoded.truncated
        self.prompts_cut += encoded.prompt_cut
        self.completions_cut += encoded.completions_cut
        self.boundary_moved += encoded.boundary_moved > 0
        self.stops_added += encoded.stops_added
        self.prompt_tokens += len(pair.prompt)
        self.chosen_tokens += len(pair.chosen)
        self.rejected_tokens += len(pair.rejected)
        self.longest = max(self.longest, len(pair))

    def add(self, other: "PairsReport") -> None:
        """Count what became of further rows of the same source."""
        for f in fields(self):
            ours, theirs = getattr(self, f.name), getattr(other, f.name)
            if isinstance(ours, Counter):
                ours.update(theirs)
            elif f.name not in NOT_ADDITIVE and type(ours) is int:
                setattr(self, f.name, ours + theirs)
        self.longest = max(self.longest, other.longest)
        for reason, places in other.dropped.items():
            self.dropped.setdefault(reason, []).extend(places)

    def lines(self) -> list[str]:
        """What a person should know; what is as expected goes unsaid."""
        return self.done() + self.left_out()

    def done(self) -> list[str]:
        """What was read, and what was done to it."""
        lines = [
            f"{self.source}: {self._count(self.kept)} ({self._schemas()})",
            self._tokens(),
        ]
        if self.judged:
            bad = self.kept - self.desirable
            lines[0] += f", {self.desirable:,} good and {bad:,} bad"
        lines += [self.origin] if self.origin else []
        if self.weight is not None:
            lines.append(f"used {self.weight:g} times an epoch: {self._count(self.per_epoch)}")
        lines += self._forms() + self._special_tokens()
        if self.truncated:
            lines.append(
                f"{self._count(self.truncated)} cut to {self.max_length:,} tokens: "
                f"{_counted(self.prompts_cut, 'prompt')} at the start, "
                f"{_counted(self.completions_cut, 'completion')} at the end, whose stop token is "
                "not scored"
            )
        if self.boundary_moved:
            lines.append(
                f"{self._count(self.boundary_moved)} with a token that spans prompt and "
                "completion; it counts as completion"
            )
        if self.stops_added:
            lines.append(
                f"stop token added to {self.stops_added:,} of {self._completions:,} completions"
            )
        if self.unused_fields:
            lines.append(f"fields not used: {', '.join(sorted(self.unused_fields))}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `run.json`, with every place of every pair that was left out."""
        values = asdict(self)
        del values["origin"]  # pairs are the same, wherever they come from
        return values | {name: dict(getattr(self, name)) for name in COUNTERS}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The report of which `to_dict` said this."""
        return cls(**{**values, **{name: Counter(values[name]) for name in COUNTERS}})

    def _schemas(self) -> str:
        """As which schema rows are read, under the names that `--schema` takes."""
        found = self.schemas.most_common()
        if len(found) == 1:
            return f"schema {found[0][0]}"
        return "schemas " + ", ".join(f"{name}: {count:,}" for name, count in found)

    def _forms(self) -> list[str]:
        lines = []
        if self.wrapped:
            lines.append(
                f"{self._count(self.wrapped)} of plain strings put into the model's chat template, "
                "as one user and one assistant turn"
            )
        if self.dialogues:
            lines.append(
                f"{self._count(self.dialogues)} of text that marks its turns put into the model's "
                "chat template, turn by turn; --chat-template text keeps the text"
            )
        if self.with_system:
            lines.append(f"{self._count(self.with_system)} with the system turn of --system")
        return lines

    def _special_tokens(self) -> list[str]:
        if not self.with_specials:
            return []
        named = ", ".join(f"`{name}`" for name, _ in self.specials.most_common(MAX_SHOWN))
        named += ", …" * (len(self.specials) > MAX_SHOWN)
        what = "which act as such in plain text"
        if not self.specials_act:
            what = "kept as plain text; if they are to act, use --chat-template text"
        return [
            f"{self._count(self.with_specials)} with special tokens in a text ({named}), {what}"
        ]

    @property
    def _completions(self) -> int:
        return self.kept if self.judged else 2 * self.kept

    def _tokens(self) -> str:
        answers = f"{self.chosen_tokens:,} chosen, {self.rejected_tokens:,} rejected"
        if self.judged:
            answers = f"{self.chosen_tokens:,} answers"
        return f"tokens: {self.prompt_tokens:,} prompt, {answers}; longest row {self.longest:,}"

    def _count(self, count: int) -> str:
        return _counted(count, "judged answer" if self.judged else "pair")

    def left_out(self) -> list[str]:
        """What was not kept, by reason."""
        lines = []
        for reason, places in self.dropped.items():
            # The file has been named: `:12` or `[12]` is enough.
            named = [place.removeprefix(self.source) for place in places[:MAX_SHOWN]]
            more = ["…"] * (len(places) > MAX_SHOWN)
            unit = "row" if self.judged else "pair"  # a row may hold two judged answers
            left_out = _counted(len(places), unit)
            lines.append(f"left out {left_out}: {reason} ({', '.join(named + more)})")
        return lines


def _counted(count: int, unit: str) -> str:
    return f"{count:,} {unit}" + "s" * (count != 1)
