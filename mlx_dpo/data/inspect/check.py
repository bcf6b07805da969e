"""Sources -> findings: training and held-out pairs, by themselves and beside each other."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mlx_dpo.data.files import RowLocations
from mlx_dpo.data.inspect.duplicates import find_alike, find_leaks
from mlx_dpo.data.inspect.findings import MODEL, ROWS, RULES, TELLING, VALID, Hits, Rule
from mlx_dpo.data.inspect.scan import Eyes, Split, Tick, pass_over
from mlx_dpo.data.sources import SplitSources


@dataclass(frozen=True)
class Finding:
    """What was found of one kind in one split."""

    rule: Rule
    count: int
    of: int  # rows or pairs, as the rule counts
    hits: Hits

    @property
    def share(self) -> float:
        """Of the rows or pairs."""
        return self.count / self.of if self.of else 0.0

    @property
    def details(self) -> dict[str, int]:
        """What was found there, most frequent first."""
        return dict(self.hits.details[self.rule.name].most_common())

    def places(self) -> Iterator[tuple[str, str | None]]:
        """Every place, with the one that it goes with."""
        return self.hits.where(self.rule.name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with every place."""
        rule = self.rule
        return {
            "name": rule.name,
            "kind": rule.kind,
            "count": self.count,
            "of": self.of,
            "unit": rule.counts,
            "share": self.share,
            "why": rule.why,
            "mend": rule.mend,
            "details": self.details,
            "places": [[at] if other is None else [at, other] for at, other in self.places()],
        }


@dataclass(frozen=True)
class Checked:
    """Training pairs, held-out ones where there are any, and what was not looked for."""

    train: Split
    valid: Split | None
    not_looked_for: dict[str, list[str]]  # what it would take: names of findings

    @property
    def splits(self) -> dict[str, Split]:
        """By name."""
        return {"train": self.train} | ({"valid": self.valid} if self.valid else {})

    @property
    def faults(self) -> int:
        """Findings that are faults, in all splits."""
        return sum(one.rule.fault for split in self.splits.values() for one in findings(split))

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        told = {
            name: {
                "rows": split.rows,
                "pairs": split.pairs,
                "reports": [report.to_dict() for report in split.reports],
                "lengths": split.lengths.to_dict(),
                "findings": [one.to_dict() for one in findings(split)],
            }
            for name, split in self.splits.items()
        }
        return {"faults": self.faults, **told, "not_looked_for": self.not_looked_for}


def check(sources: SplitSources, eyes: Eyes, tick: Tick = lambda more: None) -> Checked:
    """Look at all pairs once.

    Raises:
        DataError: a source cannot be read on.
        ConfigError: a setting has no effect.
    """
    places = RowLocations()
    train = Split(eyes, Hits(places))
    valid = Split(eyes, Hits(places)) if sources.valid else None
    for split, theirs in ((train, sources.train), (valid, sources.valid)):
        if split is not None:
            pass_over(theirs, split, tick)
            find_alike(split.digests, split.hits)
    if valid is not None:
        find_leaks(train.digests, valid.digests, train.hits)
    here = {MODEL: eyes.tokens is not None, VALID: valid is not None}
    missing = {
        need: [rule.name for rule in RULES.values() if rule.needs == need]
        for need, there in here.items()
        if not there
    }
    return Checked(train, valid, missing)


def findings(split: Split) -> list[Finding]:
    """What was found in a split, faults first, each kind in the order of the table."""
    found = [
        Finding(rule, count, split.rows if rule.counts == ROWS else split.pairs, split.hits)
        for rule in RULES.values()
        if (count := _count(rule.name, split))
    ]
    return sorted(found, key=lambda one: not one.rule.fault)


def _count(name: str, split: Split) -> int:
    if name != "length-bias":
        return split.hits.count(name)
    bias = split.lengths.bias()
    if bias is None or bias.told_apart < TELLING or not bias.beyond_chance:
        return 0
    return max(bias.chosen_longer, bias.rejected_longer)
