"""Report on the pairs of one data source: counts that a run prints and saves in `run.json`."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from mlx_dpo.data.tokenization.tokenize import TokenizedExample
from mlx_dpo.types import NO_LIST, RankedPair, TokenizedPair

NOT_ADDITIVE = ("max_length", "longest", "per_epoch")  # not sums over the rows
COUNTERS = ("schemas", "unused_fields", "specials", "unwritten")
FROM_CACHE = "tokens read from the cache"  # an origin that changes nothing
MAX_SHOWN = 3  # locations in a line; `to_dict` has all of them


@dataclass
class ListCounts:
    """Counts of the ranked lists among the pairs; a list's pairs are counted one after the other.

    `tokens` counts each prompt and each completion of a list once.
    """

    lists: int = 0
    completions: int = 0
    pairs: int = 0
    made: int = 0  # pairs that were made of these lists, before any was left out
    uneven: int = 0  # lists whose pairs have different prompts, because they were cut
    tokens: int = 0
    pair_tokens: int = 0  # prompts and completions counted in each pair
    best_worst_tokens: int = 0  # of the best and the worst completion, with the prompt
    # The last list: its key and prompt, score and length of its completions so far, whether its
    # prompts are uneven, and its part of `best_worst_tokens`.
    last: dict[str, Any] = field(default_factory=dict, compare=False)

    def keep(self, pair: TokenizedPair, ranking: RankedPair) -> None:
        """Count a pair that training will use; a plain pair is not counted."""
        if not ranking.num_pairs:
            return
        key = [ranking.list_id, pair.location]
        if self.last.get("key") != key:
            self.last = {"key": key, "prompt": pair.prompt, "seen": {}}
            self.last |= {"is_uneven": False, "best_worst": 0}
            self.lists += 1
            self.made += ranking.num_pairs
            self.tokens += len(pair.prompt)
        self.pairs += 1
        self.pair_tokens += len(pair.prompt) + len(pair.chosen) + len(pair.rejected)
        self._keep_completions(pair, ranking)

    def _keep_completions(self, pair: TokenizedPair, ranking: RankedPair) -> None:
        last, scores = self.last, (ranking.chosen_score, ranking.rejected_score)
        places = (ranking.chosen, ranking.rejected)
        for place, score, ids in zip(places, scores, (pair.chosen, pair.rejected), strict=True):
            if place not in last["seen"]:
                last["seen"][place] = (score, len(ids))
                self.completions += 1
                self.tokens += len(ids)
        if pair.prompt != last["prompt"] and not last["is_uneven"]:
            last["is_uneven"] = True
            self.uneven += 1
        rated = sorted(last["seen"].values())
        best_worst = len(pair.prompt) + rated[0][1] + rated[-1][1]
        self.best_worst_tokens += best_worst - last["best_worst"]
        last["best_worst"] = best_worst

    def add(self, other: "ListCounts") -> None:
        """Add the counts of further lists."""
        for f in fields(self):
            if f.name != "last":
                setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))

    def lines(self) -> list[str]:
        """Return what the pairs of lists cost, and which lists have changed, as lines of text."""
        if self.made == self.lists:  # one pair of each list
            return []
        base = max(1, self.best_worst_tokens)
        lines = [
            f"{_counted(self.lists, 'ranked list')}, {self.completions:,} completions, "
            f"{self.pairs:,} pairs: {self.tokens / base:.2g} times the tokens of --ranked "
            f"best_worst if pairs share completions, {self.pair_tokens / base:.2g} times if not"
        ]
        if self.pairs < self.made:
            lines.append(
                f"{self.made - self.pairs:,} of {self.made:,} pairs of these lists are left out"
            )
        if self.uneven:
            lines.append(
                f"{_counted(self.uneven, 'ranked list')} with prompts that were cut differently "
                "from pair to pair; --truncation keep_start leaves them whole"
            )
        return lines


@dataclass
class PairsReport:
    """Counts of the pairs that were loaded or dropped from one data source.

    A field counts pairs, or single answers (KTO, SFT), unless its comment names another unit.
    """

    source: str
    max_length: int
    judged: bool = False  # examples are unpaired (KTO)
    supervised: bool = False  # examples are single answers of instruction tuning (SFT)
    read: int = 0  # rows
    used: int = 0
    desirable: int = 0  # desirable unpaired examples
    dropped: dict[str, list[str]] = field(default_factory=dict)  # reason -> locations
    schemas: Counter[str] = field(default_factory=Counter)  # schema -> rows
    unused_fields: Counter[str] = field(default_factory=Counter)  # field -> rows
    wrapped: int = 0  # strings that became user and assistant turns
    dialogues: int = 0  # texts with turn marks that became messages
    with_system: int = 0
    as_chat: int = 0
    specials: Counter[str] = field(
        default_factory=Counter
    )  # special token -> pairs whose text contains it
    with_specials: int = 0
    specials_act: bool = False  # special tokens in texts are control tokens, not plain text
    unwritten: Counter[str] = field(
        default_factory=Counter
    )  # part that the chat template does not write -> pairs
    unknown_tokens: int = 0  # tokens
    with_unknown: int = 0  # with characters or words that the tokenizer does not have
    truncated: int = 0
    prompts_cut: int = 0
    completions_cut: int = 0  # completions without their stop token
    boundary_moved: int = 0
    stops_added: int = 0  # completions
    prompt_tokens: int = 0  # each prompt counts once
    chosen_tokens: int = 0
    rejected_tokens: int = 0
    longest: int = 0  # tokens of the longest row
    lists: ListCounts = field(default_factory=ListCounts)
    weight: float | None = None  # value of `--mix`: uses of each pair per epoch
    per_epoch: int = 0  # training pairs per epoch, with `weight`
    origin: str = field(default="", compare=False)  # a remark about the token cache

    def drop(self, location: str, reason: str) -> None:
        """Record the location of a dropped pair under the reason for dropping it."""
        self.dropped.setdefault(reason, []).append(location)

    def keep(
        self, example: TokenizedExample, *, was_text: bool, ranking: RankedPair = NO_LIST
    ) -> None:
        """Count a pair that training will use; `was_text`: its prompt was a string."""
        pair = example.pair
        self.lists.keep(pair, ranking)
        self.used += 1
        self.desirable += bool(pair.desirable)
        self.dialogues += example.was_dialogue
        self.wrapped += was_text and example.as_chat and not example.was_dialogue
        self.with_system += example.with_system
        self.as_chat += example.as_chat
        self.specials.update(example.specials)
        self.with_specials += bool(example.specials)
        self.unwritten.update(example.unwritten)
        self.unknown_tokens += example.unknown_tokens
        self.with_unknown += example.has_unknown
        self.truncated += example.truncated
        self.prompts_cut += example.prompt_cut
        self.completions_cut += example.completions_cut
        self.boundary_moved += example.boundary_moved > 0
        self.stops_added += example.stops_added
        self.prompt_tokens += len(pair.prompt)
        self.chosen_tokens += pair.num_scored
        self.prompt_tokens += len(pair.chosen) - pair.num_scored  # context between two answers
        self.rejected_tokens += len(pair.rejected)
        self.longest = max(self.longest, len(pair))

    def add(self, other: "PairsReport") -> None:
        """Add the counts of `other`, a report on further rows of the same source."""
        for f in fields(self):
            own, further = getattr(self, f.name), getattr(other, f.name)
            if isinstance(own, Counter):
                own.update(further)
            elif f.name not in NOT_ADDITIVE and type(own) is int:
                setattr(self, f.name, own + further)
        self.longest = max(self.longest, other.longest)
        self.lists.add(other.lists)
        for reason, locations in other.dropped.items():
            self.dropped.setdefault(reason, []).extend(locations)

    def lines(self) -> list[str]:
        """Return the report as lines of text, without counts that are zero."""
        return self.loaded_lines() + self.dropped_lines()

    def loaded_lines(self) -> list[str]:
        """Return the report on the loaded pairs as lines of text, without the dropped pairs."""
        lines = [
            f"{self.source}: {self._count(self.used)} ({self._schemas()})",
            self._tokens(),
        ]
        if self.judged:
            bad = self.used - self.desirable
            lines[0] += f", {self.desirable:,} good and {bad:,} bad"
        lines += [self.origin] if self.origin else []
        lines += self.lists.lines()
        if self.weight is not None:
            lines.append(f"used {self.weight:g} times per epoch: {self._count(self.per_epoch)}")
        lines += self._template_lines() + self._special_token_lines()
        lines += self._unknown_token_lines() + self._truncation_lines()
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

    def warning_lines(self) -> list[str]:
        """Return the lines of the report on what is lost or different from the rows as written."""
        lines = [self.origin] if self.origin not in ("", FROM_CACHE) else []
        lines += self.lists.lines()
        lines += self._unwritten_lines() + self._special_token_lines()
        lines += self._unknown_token_lines() + self._truncation_lines() + self.dropped_lines()
        return [f"{self.source}: {line}" for line in lines[:1]] + lines[1:]

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as a JSON-compatible dictionary, with all dropped pairs' locations."""
        values = asdict(self)
        del values["origin"]  # the pairs are the same with and without the cache
        del values["lists"]["last"]
        values["kept"] = values.pop("used")  # the key in `run.json`
        return values | {name: dict(getattr(self, name)) for name in COUNTERS}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build the report from the dictionary that `to_dict` returned."""
        counts = dict(values)
        counts["used"] = counts.pop("kept")
        counts["lists"] = ListCounts(**values["lists"])
        return cls(**counts | {name: Counter(values[name]) for name in COUNTERS})

    def _schemas(self) -> str:
        """Return text that names the rows' schema, or each schema with its number of rows."""
        counts = self.schemas.most_common()
        if len(counts) == 1:
            return f"schema {counts[0][0]}"
        return "schemas " + ", ".join(f"{name}: {count:,}" for name, count in counts)

    def _template_lines(self) -> list[str]:
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
            lines.append(f"{self._count(self.with_system)} with the system message of --system")
        return lines + self._unwritten_lines()

    def _unwritten_lines(self) -> list[str]:
        return [
            f"{self._count(count)} with `{name}` that the model's chat template drops"
            for name, count in self.unwritten.most_common()
        ]

    def _special_token_lines(self) -> list[str]:
        if not self.with_specials:
            return []
        names = ", ".join(f"`{name}`" for name, _ in self.specials.most_common(MAX_SHOWN))
        names += ", …" * (len(self.specials) > MAX_SHOWN)
        effect = "which take effect in plain text"
        if not self.specials_act:
            effect = "encoded as plain text; with --chat-template text they take effect"
        return [
            f"{self._count(self.with_specials)} with special tokens in a text ({names}), {effect}"
        ]

    def _unknown_token_lines(self) -> list[str]:
        if not self.with_unknown:
            return []
        tokens = f" ({_counted(self.unknown_tokens, 'unknown token')})"
        return [
            f"{self._count(self.with_unknown)} with characters or words that the tokenizer "
            f"does not have{tokens * (self.unknown_tokens > 0)}"
        ]

    def _truncation_lines(self) -> list[str]:
        if not self.truncated:
            return []
        return [
            f"{self._count(self.truncated)} cut to {self.max_length:,} tokens: "
            f"{_counted(self.prompts_cut, 'prompt')} at the start, "
            f"{_counted(self.completions_cut, 'completion')} at the end, whose stop token is "
            "not scored"
        ]

    @property
    def has_single_answers(self) -> bool:
        """Whether an example has one answer (KTO, SFT) instead of two."""
        return self.judged or self.supervised

    @property
    def unit(self) -> str:
        """Word for an example: `pair`, `labelled answer` (KTO) or `row` (SFT)."""
        return "labelled answer" if self.judged else "row" if self.supervised else "pair"

    @property
    def _completions(self) -> int:
        return self.used if self.has_single_answers else 2 * self.used

    def _tokens(self) -> str:
        answers = f"{self.chosen_tokens:,} chosen, {self.rejected_tokens:,} rejected"
        if self.has_single_answers:
            answers = f"{self.chosen_tokens:,} answers"
        return f"tokens: {self.prompt_tokens:,} prompt, {answers}; longest row {self.longest:,}"

    def _count(self, count: int) -> str:
        return _counted(count, self.unit)

    def dropped_lines(self) -> list[str]:
        """Return one line of text per reason: how many pairs were dropped for it, and where."""
        lines = []
        for reason, locations in self.dropped.items():
            # `:12` or `[12]`, as another line names the file.
            shown = [location.removeprefix(self.source) for location in locations[:MAX_SHOWN]]
            more = ["…"] * (len(locations) > MAX_SHOWN)
            unit = "row" if self.has_single_answers else "pair"  # for KTO a pair is two
            dropped = _counted(len(locations), unit)
            lines.append(f"left out {dropped}: {reason} ({', '.join(shown + more)})")
        return lines


def _counted(count: int, unit: str) -> str:
    return f"{count:,} {unit}" + "s" * (count != 1)
