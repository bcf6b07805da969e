"""Principles for answers: sentences that say what an answer is, with requests about an answer."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from mlx_dpo.config.yaml_file import read_yaml
from mlx_dpo.data.prompts import Prompt
from mlx_dpo.errors import ConfigError
from mlx_dpo.io.bounded import read_text
from mlx_dpo.types import Message

DEFAULT = "default"  # instead of a file: the principles of the package
PACKAGE = "mlx_dpo.collect.principles"
YAML_SUFFIXES = (".yaml", ".yml")
PLACEHOLDER = "{principle}"
CRITIQUE_REQUEST = (
    "Criticise your last answer by this principle: {principle} Say briefly where it falls short."
)
REVISION_REQUEST = (
    "Write your last answer again so that it follows this principle: {principle} Keep what is "
    "right. Give only the new answer."
)


@dataclass(frozen=True, slots=True)
class Principle:
    """A principle in one sentence, and the requests to criticise and to revise an answer by it."""

    text: str
    critique: str = CRITIQUE_REQUEST
    revision: str = REVISION_REQUEST

    @property
    def critique_request(self) -> str:
        """Request for a critique, which follows the answer as a user turn."""
        return self.critique.replace(PLACEHOLDER, self.text)

    @property
    def revision_request(self) -> str:
        """Request for a revision, which follows the critique as a user turn."""
        return self.revision.replace(PLACEHOLDER, self.text)


@dataclass(frozen=True)
class PrincipleDraw:
    """Draw of `count` different principles for a prompt, which depends on prompt and seed alone.

    Raises:
        ConfigError: `count` is below 1, or there are fewer principles.
    """

    principles: Sequence[Principle]
    count: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"`revisions` must be at least 1, got {self.count}")
        if self.count > len(self.principles):
            raise ConfigError(
                f"`revisions` {self.count} needs {self.count} principles, because each revision "
                f"follows another one; found {len(self.principles)}"
            )

    def for_prompt(self, messages: Sequence[Message]) -> list[Principle]:
        """Return the principles for a prompt, in the order of the revisions."""
        key = Prompt(tuple(messages)).key
        return random.Random(f"{self.seed} {key}").sample(list(self.principles), self.count)

    def rubric_values(self, messages: Sequence[Message]) -> dict[str, str]:
        """Return what the placeholder `{principles}` of a judge's rubric stands for."""
        return {"{principles}": "\n".join(p.text for p in self.for_prompt(messages))}


def principles_digest(principles: Sequence[Principle]) -> str:
    """Return the SHA-256 digest of the principles and their requests, in hex."""
    return sha256(repr(list(principles)).encode()).hexdigest()


def default_principles() -> str:
    """Return the text of the file of principles that the package has."""
    return (files(PACKAGE) / "principles.yaml").read_text("utf-8")


def principle_rubric() -> str:
    """Return the text of the default rubric for judges that compare answers by principles."""
    return (files(PACKAGE) / "rubric.txt").read_text("utf-8")


def read_principles(name: str) -> list[Principle]:
    """Return the principles of a file, or those of the package if `name` is `default`.

    A YAML file has a list `principles` of sentences, or of mappings with `principle`, and
    `critique` and `revision` if the requests differ from the usual ones. Any other file has one
    principle per line; empty lines and lines that begin with `#` are skipped.

    Raises:
        ConfigError: the file cannot be read, has no principle, or has one twice.
    """
    path = Path(name).expanduser()
    if name == DEFAULT:
        with as_file(files(PACKAGE) / "principles.yaml") as shipped:
            return _from_yaml(str(shipped))
    principles = _from_yaml(name) if path.suffix in YAML_SUFFIXES else _from_lines(path)
    if not principles:
        raise ConfigError(f"{name}: has no principle; write one per line")
    return principles


def _from_lines(path: Path) -> list[Principle]:
    text = read_text(path, ConfigError, accept_pipe=True)
    principles: dict[str, Principle] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if (sentence := line.strip()) and not sentence.startswith("#"):
            _add(principles, Principle(sentence), f"{path}:{number}")
    return list(principles.values())


def _add(principles: dict[str, Principle], principle: Principle, location: str) -> None:
    if principle.text in principles:
        raise ConfigError(f"{location}: has this principle twice; remove one of the two")
    principles[principle.text] = principle


def _from_yaml(name: str) -> list[Principle]:
    document = read_yaml(name)
    entries = document.get("principles")
    if others := document.keys() - {"principles"}:
        raise ConfigError(f"{name}: unknown entry `{min(map(str, others))}`; use `principles`")
    if not isinstance(entries, list):
        raise ConfigError(
            f"{name}: `principles` must be a list, found {type(entries).__name__}; write each "
            "principle as `- sentence`"
        )
    principles: dict[str, Principle] = {}
    for number, entry in enumerate(entries, start=1):
        location = f"{name}: principle {number}"
        _add(principles, _parse_entry(entry, location), location)
    return list(principles.values())


def _parse_entry(entry: Any, location: str) -> Principle:
    """Return the principle of an entry in a YAML list: a sentence, or a mapping."""
    fields: Mapping[Any, Any] = entry if isinstance(entry, dict) else {"principle": entry}
    if others := fields.keys() - {"principle", "critique", "revision"}:
        raise ConfigError(
            f"{location}: unknown field `{min(map(str, others))}`; use `principle`, `critique` "
            "and `revision`, or put a sentence with a colon in quotation marks"
        )
    for name in ("principle", *fields):
        text = fields.get(name)
        if not isinstance(text, str) or not text.strip():
            found = "nothing" if text is None else type(text).__name__
            found = "an empty text" if isinstance(text, str) else found
            raise ConfigError(f"{location}: `{name}` must be a text, found {found}")
    return Principle(
        fields["principle"].strip(),
        fields.get("critique", CRITIQUE_REQUEST).strip(),
        fields.get("revision", REVISION_REQUEST).strip(),
    )
