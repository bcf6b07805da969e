"""A file -> prompts: what a model is asked, without answers."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from mlx_dpo.data.sources import find_sources, resolve_source
from mlx_dpo.errors import BadPairError, DataError
from mlx_dpo.schemas import has_pair_schema, parse_pairs
from mlx_dpo.schemas import hh_rlhf as dialogues
from mlx_dpo.schemas.messages import get_field_type, parse_messages, parse_text, to_messages
from mlx_dpo.schemas.schema import Row
from mlx_dpo.types import Message, Text

LINES = ".txt"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that ends where a model is to answer."""

    messages: tuple[Message, ...]
    location: str = ""
    text: str | None = None  # a whole text as it stood, where its marks made the messages

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
    return check_prompts(
        _lines(path) if lines else map(row_to_prompt, resolve_source(name).rows()), name
    )


def read_held_out_prompts(name: str) -> list[Prompt] | None:
    """The prompts of a folder's or a dataset's own held-out split, None where there is none."""
    if Path(name).suffix == LINES:
        return None
    rows = [row for source in find_sources(name).valid for row in source.rows()]
    return check_prompts(map(row_to_prompt, rows), name) if rows else None


def check_prompts(prompts: Iterable[Prompt], name: str) -> list[Prompt]:
    """Each prompt once, in order.

    Raises:
        DataError: there is none.
    """
    found = unique_prompts(prompts)
    if not found:
        raise DataError(f"{name}: no prompts in it; write one on each line")
    return found


def unique_prompts(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Each prompt once, in order."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.key, prompt)
    return list(first.values())


def make_prompt(text: Text, location: str = "", *, whole: bool = False) -> Prompt:
    """Text as one turn of the user; messages as they are, without answers at their end.

    A `whole` text that marks its turns is these turns, as where it is trained on.
    """
    if whole and isinstance(text, str) and (marked := dialogues.parse_turns(text)) is not None:
        return replace(make_prompt(marked, location), text=text)
    turns = to_messages(text, "user")
    while turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    if not turns or not any(str(turn["content"]).strip() for turn in turns):
        raise DataError(f"{location}: the prompt is empty; write what is to be asked")
    return Prompt(turns, location)


def add_system_prompt(prompts: Iterable[Prompt], system: str | None) -> list[Prompt]:
    """Each with a system turn before it where it has none; as they are without one."""
    turn: Message = {"role": "system", "content": system}
    return [
        prompt
        if system is None or prompt.messages[0]["role"] in ("system", "developer")
        else replace(prompt, messages=(turn, *prompt.messages))
        for prompt in prompts
    ]


def row_to_prompt(row: Row) -> Prompt:
    """What a row asks: that of a pair as it is trained on.

    Raises:
        DataError: it asks nothing, or with more than text.
    """
    record = row.record
    for name in ("tools", "chat_template_kwargs"):
        if record.get(name):
            raise _more_than_text(row.location, name)
    if not record.get("messages") and has_pair_schema(row):
        return _of_pair(row)
    return _alone(row)


def check_no_template_kwargs(given: Mapping[str, Any], location: str) -> None:
    """DataError for what a template reads beside the turns."""
    for name in given:
        raise _more_than_text(location, name)


def _more_than_text(location: str, name: str) -> DataError:
    return DataError(f"{location}: `{name}` beside a prompt cannot be asked with here")


def _of_pair(row: Row) -> Prompt:
    try:
        found = parse_pairs(row)
    except BadPairError as bad:
        why = bad.reason
    else:
        if found:
            check_no_template_kwargs(found[0].template_kwargs, row.location)
            return make_prompt(found[0].prompt, row.location, whole=found[0].implicit_prompt)
        why = "its answers tie"
    # A pair may teach nothing and still ask something; answers in turns bring more than `prompt`.
    if row.record.get("prompt") and not isinstance(row.record.get("chosen"), list):
        return _alone(row)
    raise DataError(f"{row.location}: no prompt can be read of it ({why}); leave the row out")


def _alone(row: Row) -> Prompt:
    """The prompt, or the conversation, that stands in a field of its own."""
    record = row.record
    for name in ("prompt", "messages"):
        value: Any = record.get(name)
        if value is None or value == "":
            continue
        if get_field_type(value, name, row.location) == "messages":
            return make_prompt(parse_messages(value, name, row.location), row.location)
        [prompt] = add_system_prompt(
            [make_prompt(parse_text(value, name, row.location), row.location)], _system_beside(row)
        )
        return prompt
    found = ", ".join(f"`{name}`" for name in sorted(record)) or "nothing"
    raise DataError(f"{row.location}: no `prompt` and no `messages` (found {found})")


def _system_beside(row: Row) -> str | None:
    """The `system` beside a text; labelled rows are trained on without it."""
    if "label" in row.record:
        return None
    return parse_text(row.record.get("system") or "", "system", row.location) or None


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
            yield make_prompt(text, where)
