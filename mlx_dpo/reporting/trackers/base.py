"""Rows of metrics to other programs too, each once; a program that fails does not end a run.

What such a program keeps on this machine is written anew, from the rows there are, whenever a run
goes on: killed, none of them has all it was told on the disk, and rows after the last checkpoint
are going to be told again. What lies elsewhere is told the rows that it lacks.
"""

import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, Protocol, cast

from mlx_dpo.errors import reason

Row = Mapping[str, float]

# What libraries raise for disks, networks and names; some have classes of their own beside.
FAILURES: tuple[type[Exception], ...] = (OSError, RuntimeError, ValueError)


@dataclass(frozen=True, kw_only=True)
class Announced:
    """What a program is told of a run, beside its rows."""

    id: str
    name: str
    project: str | None  # None: what its own settings say
    folder: Path  # of the run
    settings: Mapping[str, Any]
    before: int = 0  # the step up to which this program was told the rows by an earlier process


class Sink(Protocol):
    """A program that is told of a run."""

    name: str
    where: str  # to see what it was told

    def write(self, row: Row) -> None:
        """Tell it a row; one that it has is passed over."""

    def close(self, *, whole: bool) -> None:
        """Let it keep all it was told; the run is `whole`, or broke off."""

    @staticmethod
    def failures() -> tuple[type[Exception], ...]:
        """What its library raises where it cannot do what it is asked."""


def named_there(row: Row) -> dict[str, float]:
    """A row under the names that transformers gives it in all of these programs."""
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in row.items()
        if name != "step"
    }


@dataclass
class Sinks:
    """The programs that are told of a run; none is a program fewer."""

    open: list[Sink] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)  # what a person is to know of what went wrong

    def write(self, row: Row) -> None:
        """Tell all of them a row."""
        for sink in list(self.open):
            try:
                sink.write(row)
            except sink.failures() as error:
                self.open.remove(sink)
                self.lost.append(
                    f"{sink.name} is told nothing from step {int(row['step'])} on "
                    f"({reason(error)}); the run goes on, and all is in metrics.jsonl"
                )
                self._close(sink, whole=False, heard=[])

    def close(self, *, whole: bool) -> None:
        """Let go of all of them; the run is `whole`, or broke off."""
        while self.open:
            sink = self.open.pop()
            if (error := self._close(sink, whole=whole, heard=self.lost)) is not None:
                self.lost.append(
                    f"{sink.name} may lack the end of the run ({reason(error)}); all is in "
                    "metrics.jsonl"
                )

    @staticmethod
    def _close(sink: Sink, *, whole: bool, heard: list[str]) -> Exception | None:
        try:
            with quiet(sink.name, heard):
                sink.close(whole=whole)
        except sink.failures() as error:
            return error
        return None


def remove_others(kept: Path, folders: Iterable[Path]) -> None:
    """Remove what earlier processes of a run were told; all of it is told anew."""
    for folder in folders:
        if folder != kept:
            shutil.rmtree(folder)


@contextmanager
def quiet(name: str = "", heard: list[str] | None = None) -> Iterator[None]:
    """What a library would print is for its own command line, not amid that of this one.

    What it warns of goes to `heard`, a line each, after its `name`.
    """
    with (
        redirect_stdout(StringIO()),
        redirect_stderr(StringIO()),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        try:
            yield
        finally:
            told = [w for w in caught if issubclass(w.category, UserWarning)]
            if heard is not None:
                heard += [f"{name}: {reason(cast(Warning, w.message)).lstrip('* ')}" for w in told]
