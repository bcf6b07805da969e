"""One mutated input: the damage that is done, the commands that meet it, and what they may say."""

import json
import random
import re
import shutil
import traceback
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from mlx_dpo.cli import cli
from tests.fuzz.mutations import dump, mutate_bytes, mutate_value

LONGEST_MESSAGE = 1200  # characters
JSON_SUFFIXES = (".json",)


class FailedInputError(Exception):
    """The product met an input in a manner that it must not."""


class Case:
    """The input with number `index` of an area, in a folder of its own, which is the current one.

    Everything about it comes from the area's name and the index.
    """

    def __init__(
        self, area: str, index: int, material: Path, announce: Callable[[str], None]
    ) -> None:
        """Seed the random source of the input.

        Args:
            material: the folder of undamaged files.
            announce: receives the description of each mutation before a command meets it.
        """
        self._announce = announce
        self.index = index
        self.material = material
        self.draw = random.Random(f"{area}/{index}")
        self.mutations: list[str] = []
        self.outcomes: list[str] = []

    def record(self, mutation: str) -> None:
        """Note a mutation, also for the case that the process dies of it."""
        self.mutations.append(mutation)
        self._announce(mutation)

    def copy(self, *names: str) -> None:
        """Copy undamaged files or folders into the current folder."""
        for name in names:
            source = self.material / name
            if source.is_dir():
                shutil.copytree(source, name)
            else:
                shutil.copy(source, name)

    def damage(self, path: Path, others: list[bytes] | None = None) -> None:
        """Mutate a file in place, at one of the two levels."""
        data = path.read_bytes()
        structured = self._damage_structure(path, data) if self.draw.random() < 0.5 else None
        if structured is None:
            name, changed = mutate_bytes(data, self.draw, others or self._others())
        else:
            name, changed = structured
        self.record(f"{path}: {name}")
        path.write_bytes(changed)

    def _others(self) -> list[bytes]:
        files = ("pairs.jsonl", "base/tokenizer.json", "run/adapters.safetensors", "settings.yaml")
        return [(self.material / name).read_bytes() for name in files]

    def _damage_structure(self, path: Path, data: bytes) -> tuple[str, bytes] | None:
        if path.suffix == ".json":
            name, value = mutate_value(json.loads(data), self.draw)
            return name, dump(value, indent=2)
        if path.suffix == ".jsonl":
            return self._damage_line(data)
        if path.suffix == ".safetensors":
            return self._damage_header(data)
        return None

    def _damage_line(self, data: bytes) -> tuple[str, bytes]:
        lines = data.splitlines()
        number = self.draw.randrange(len(lines))
        name, value = mutate_value(json.loads(lines[number]), self.draw)
        lines[number] = dump(value)
        return f"line {number + 1}: {name}", b"".join(line + b"\n" for line in lines)

    def _damage_header(self, data: bytes) -> tuple[str, bytes] | None:
        size = int.from_bytes(data[:8], "little")
        try:
            entries = json.loads(data[8 : 8 + size])
        except ValueError:  # a file of another kind that was renamed
            return None
        name, value = mutate_value(entries, self.draw)
        header = dump(value)
        return f"header: {name}", len(header).to_bytes(8, "little") + header + data[8 + size :]

    def invoke(self, *words: str, text: bool = False, stdin: str | None = None) -> Result:
        """Run a command as a person types it; raise `FailedInputError` if it may not answer so.

        Allowed are success, and status 1 with one line that begins with `Error: `. With `text`,
        stdout is a model's text, in which any character may stand.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = CliRunner().invoke(cli, list(words), input=stdin)
        self.outcomes.append(f"{words[0]} -> {result.exit_code}: {last_line(result.stderr)}")
        check_result(result, stdout=not text)
        return result


def last_line(text: str) -> str:
    """Return the last line of a text, shortened."""
    lines = text.splitlines() or [""]
    return ascii(lines[-1][:300])


def check_result(result: Result, *, stdout: bool) -> None:
    """Raise `FailedInputError` unless a command succeeded, or failed with a single plain line."""
    error = result.exception
    if error is not None and not isinstance(error, SystemExit):
        raise FailedInputError(f"traceback: {describe(error)}")
    if result.exit_code not in (0, 1):
        raise FailedInputError(f"exit status {result.exit_code}: {last_line(result.stderr)}")
    for name, shown in (("stderr", result.stderr), ("stdout", result.stdout if stdout else "")):
        if control := {c for c in shown if is_control(c)}:
            raise FailedInputError(f"control characters on {name}: {sorted(control)!a}")
    if result.exit_code:
        check_error(result.stderr)


def check_error(stderr: str) -> None:
    """Raise `FailedInputError` unless stderr ends in one line `Error: …` of readable length."""
    begin = re.search(r"^Error: ", stderr, re.MULTILINE)
    if begin is None:
        raise FailedInputError(f"status 1 without an error line: {last_line(stderr)}")
    message = stderr[begin.end() :].removesuffix("\n")
    if not message.strip():
        raise FailedInputError("an empty error message")
    if "\n" in message:
        raise FailedInputError(f"an error of several lines: {message[:300]!a}")
    if len(message) > LONGEST_MESSAGE:
        raise FailedInputError(f"an error of {len(message)} characters: {message[:300]!a}")


def is_control(character: str) -> bool:
    """Return whether a character moves the cursor or the direction of a terminal's text."""
    if character in "\n\t":
        return False
    return unicodedata.category(character) in ("Cc", "Zl", "Zp") or character in BIDIRECTIONAL


BIDIRECTIONAL = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def describe(error: BaseException) -> str:
    """Return an exception's type and message, and where in this package it came from."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/mlx_dpo/" in f.filename]
    last = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__} at {last}: {str(error)[:200]!a}"


def parse(result: Result) -> Any:
    """Return the JSON object that a command printed."""
    return json.loads(result.stdout)
