"""A file -> prompts: what a model is asked, without answers."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from mlx_dpo.errors import DataError
from mlx_dpo.preferences.rows import Row
from mlx_dpo.preferences.schemas import to_preferences
from mlx_dpo.preferences.schemas.messages import as_turns, kind_of, text_of, turns_of
from mlx_dpo.preferences.sources import find, source_of
from mlx_dpo.types import Message, Text

LINES = ".txt"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that ends where a model is to answer."""

    messages: tuple[Message, ...]
    where: str = ""

    @property
    def key(self) -> str:
        """Digest of the messages, to tell like prompts by."""
        return sha256(json.dumps(self.messages, sort_keys=True).encode()).hexdigest()


def read_prompts(name: str) -> list[Prompt]:
    """The prompts of a file, a folder's `train` or a dataset on the Hub, each once, in order.

    A `.txt` file has one on each line. Other rows have a `prompt` (text, or messages), or
    `messages`, whose last answer is left out; or they are pairs, in any way that `train` reads.

    Raises:
        DataError: names the file, the line, and what was found there.
    """
    path = Path(name).expanduser()
    lines = path.suffix == LINES
    return prompts_of(_lines(path) if lines else map(prompt_of_row, source_of(name).rows()), name)


def held_out_prompts(name: str) -> list[Prompt] | None:
    """The prompts of a folder's or a dataset's own held-out split, None where there is none."""
    if Path(name).suffix == LINES:
        return None
    rows = [row for source in find(name).valid for row in source.rows()]
    return prompts_of(map(prompt_of_row, rows), name) if rows else None


def prompts_of(prompts: Iterable[Prompt], name: str) -> list[Prompt]:
    """Each prompt once, in order.

    Raises:
        DataError: there is none.
    """
    found = distinct(prompts)
    if not found:
        raise DataError(f"{name}: no prompts in it; write one on each line")
    return found


def distinct(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Each prompt once, in order."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.key, prompt)
    return list(first.values())


def as_prompt(text: Text, where: str = "") -> Prompt:
    """Text as one turn of the user; messages as they are, without answers at their end."""
    turns = as_turns(text, "user")
    while turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    if not turns or not any(str(turn["content"]).strip() for turn in turns):
        raise DataError(f"{where}: the prompt is empty; write what is to be asked")
    return Prompt(turns, where)


def with_system(prompts: Iterable[Prompt], system: str | None) -> list[Prompt]:
    """Each with a system turn before it where it has none; as they are without one."""
    turn: Message = {"role": "system", "content": system}
    return [
        prompt
        if system is None or prompt.messages[0]["role"] in ("system", "developer")
        else Prompt((turn, *prompt.messages), prompt.where)
        for prompt in prompts
    ]


def prompt_of_row(row: Row) -> Prompt:
    """What a row asks.

    Raises:
        DataError: it asks nothing, or with more than text.
    """
    record = row.record
    for name in ("tools", "chat_template_kwargs"):
        if record.get(name):
            raise DataError(f"{row.where}: `{name}` beside a prompt cannot be asked with here")
    for name in ("prompt", "messages"):
        value: Any = record.get(name)
        if value is not None and value != "":
            text = kind_of(value, name, row.where) == "text"
            read = text_of(value, name, row.where) if text else turns_of(value, name, row.where)
            return as_prompt(read, row.where)
    if not {"chosen", "rejected"} & record.keys():
        found = ", ".join(f"`{name}`" for name in sorted(record)) or "nothing"
        raise DataError(f"{row.where}: no `prompt` and no `messages` (found {found})")
    found_pairs = to_preferences(row)
    if not found_pairs:
        raise DataError(f"{row.where}: no prompt can be read of a row whose answers tie")
    return as_prompt(found_pairs[0].prompt, row.where)


def _lines(path: Path) -> Iterator[Prompt]:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise DataError(f"{where}: not UTF-8; save the file as UTF-8") from None
        if text:
            yield as_prompt(text, where)
