"""What became of a file of pairs: the counts that a person and `run.json` are told."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from mlx_dpo.preferences.tokens import Encoded

SHOWN = 3  # places named for each reason; `to_dict` has all of them


@dataclass
class PairsReport:
    """Counts over one file. Pairs unless another unit is named."""

    source: str
    max_length: int
    read: int = 0
    kept: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)  # reason: places
    schemas: Counter[str] = field(default_factory=Counter)  # rows by the way they are written
    unused_fields: Counter[str] = field(default_factory=Counter)  # rows that have such a field
    wrapped: int = 0  # strings that became a user and an assistant turn
    as_chat: int = 0
    truncated: int = 0
    boundary_moved: int = 0
    stops_added: int = 0  # completions
    prompt_tokens: int = 0  # once a pair, though two rows hold it
    chosen_tokens: int = 0
    rejected_tokens: int = 0
    longest: int = 0  # tokens of the longest row

    def drop(self, where: str, reason: str) -> None:
        """Count a pair that is left out."""
        self.dropped.setdefault(reason, []).append(where)

    def keep(self, encoded: Encoded, *, was_text: bool) -> None:
        """Count a pair that is used."""
        pair = encoded.pair
        self.kept += 1
        self.wrapped += was_text and encoded.as_chat
        self.as_chat += encoded.as_chat
        self.truncated += encoded.truncated
        self.boundary_moved += encoded.boundary_moved > 0
        self.stops_added += encoded.stops_added
        self.prompt_tokens += len(pair.prompt)
        self.chosen_tokens += len(pair.chosen)
        self.rejected_tokens += len(pair.rejected)
        self.longest = max(self.longest, len(pair))

    def lines(self) -> list[str]:
        """What a person should know; what is as expected goes unsaid."""
        schemas = "; ".join(
            name if count == self.read else f"{count} {name}"
            for name, count in self.schemas.most_common()
        )
        lines = [
            f"{self.source}: {_pairs(self.kept)} ({schemas})",
            f"tokens: {self.prompt_tokens:,} prompt, {self.chosen_tokens:,} chosen, "
            f"{self.rejected_tokens:,} rejected; longest row {self.longest:,}",
        ]
        if self.wrapped:
            lines.append(
                f"{_pairs(self.wrapped)} of plain strings put into the model's chat template, "
                "as one user and one assistant turn"
            )
        if self.truncated:
            lines.append(f"{_pairs(self.truncated)} cut to {self.max_length:,} tokens")
        if self.boundary_moved:
            lines.append(
                f"{_pairs(self.boundary_moved)} with a token that spans prompt and completion; "
                "it counts as completion"
            )
        if self.stops_added:
            lines.append(
                f"stop token added to {self.stops_added:,} of {2 * self.kept:,} completions"
            )
        if self.unused_fields:
            lines.append(f"fields not used: {', '.join(sorted(self.unused_fields))}")
        return lines + self._left_out()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `run.json`, with every place of every pair that was left out."""
        values = asdict(self)
        return values | {name: dict(getattr(self, name)) for name in ("schemas", "unused_fields")}

    def _left_out(self) -> list[str]:
        lines = []
        for reason, places in self.dropped.items():
            # The file has been named: `:12` or `[12]` is enough.
            named = [place.removeprefix(self.source) for place in places[:SHOWN]]
            more = ["…"] * (len(places) > SHOWN)
            lines.append(f"left out {_pairs(len(places))}: {reason} ({', '.join(named + more)})")
        return lines


def _pairs(count: int) -> str:
    return f"{count:,} pair" + "s" * (count != 1)
