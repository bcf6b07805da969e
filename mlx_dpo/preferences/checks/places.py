"""Where things were found: many places in little memory."""

import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator

# A number within 64 bits, written as Python writes it.
NUMBERED = re.compile(r"(.*?)(0|[1-9]\d{0,17})(\]?)", re.DOTALL)
WORDINGS = 50  # different details of one finding that are told apart
OTHERS = "others"


class Places:
    """Names like `file:12` and `file[12]`, by number; 12 bytes each whatever the file is called."""

    def __init__(self) -> None:
        self._forms: dict[tuple[str, str] | str, int] = {}
        self._names: list[tuple[str, str] | str] = []
        self._form = array("i")
        self._number = array("q")

    def __len__(self) -> int:
        return len(self._form)

    def add(self, where: str) -> int:
        """Keep a place; gives its number, which is that of the last where it is the same."""
        found = NUMBERED.fullmatch(where)
        name = (found[1], found[3]) if found else where
        form = self._forms.setdefault(name, len(self._names))
        if form == len(self._names):
            self._names.append(name)
        number = int(found[2]) if found else 0
        if not self._form or (self._form[-1], self._number[-1]) != (form, number):
            self._form.append(form)
            self._number.append(number)
        return len(self._form) - 1

    def __getitem__(self, at: int) -> str:
        name = self._names[self._form[at]]
        return name if isinstance(name, str) else f"{name[0]}{self._number[at]}{name[1]}"


class Hits:
    """The places of every finding, in the order in which they were found."""

    def __init__(self, places: Places) -> None:
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
