"""Read prompts from files and datasets; completions are ignored."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from mlx_dpo.data.sources import find_sources, resolve_source
from mlx_dpo.errors import BadPairError, DataError
from mlx_dpo.io.bounded import decode, read_bytes
from mlx_dpo.schemas import has_pair_schema, parse_pairs
from mlx_dpo.schemas.messages import get_field_type, parse_messages, parse_text, to_messages
from mlx_dpo.schemas.pairs import hh_rlhf
from mlx_dpo.schemas.schema import Row, format_names
from mlx_dpo.types import Message, Text

LINES = ".txt"  # suffix of files with one prompt per line


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that the model is to continue."""

    messages: tuple[Message, ...]
    location: str = ""
    text: str | None = None  # the original text, if its turn marks were parsed into the messages

    @property
    def key(self) -> str:
        """Digest of the messages; equal prompts have equal keys."""
        return sha256(json.dumps(self.messages, sort_keys=True).encode()).hexdigest()


def read_prompts(name: str) -> list[Prompt]:
    """Return the prompts of a file, or of the train split of a folder or Hub dataset.

    A `.txt` file has one prompt per line. Rows of other files have a `prompt` (text or messages)
    or `messages` (final assistant turns are removed), or they are preference pairs of any
    schema. Repeated prompts are dropped.

    Raises:
        DataError: a prompt cannot be read; the message has the location.
    """
    path = Path(name).expanduser()
    if path.suffix == LINES:
        return collect_prompts(_read_lines(path), name)
    return collect_prompts(map(row_to_prompt, resolve_source(name).rows()), name)


def read_held_out_prompts(name: str) -> list[Prompt] | None:
    """Return the prompts of a folder's or Hub dataset's held-out split; None if it has none."""
    if Path(name).suffix == LINES:
        return None
    rows = [row for source in find_sources(name).valid for row in source.rows()]
    return collect_prompts(map(row_to_prompt, rows), name) if rows else None


def collect_prompts(prompts: Iterable[Prompt], name: str) -> list[Prompt]:
    """Return the prompts of the source called `name` in order, without repetitions.

    Raises:
        DataError: there is no prompt.
    """
    unique = unique_prompts(prompts)
    if not unique:
        raise DataError(f"{name}: contains no prompts; write one per line")
    return unique


def unique_prompts(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Return the prompts in order, without repetitions."""
    unique: dict[str, Prompt] = {}
    for prompt in prompts:
        unique.setdefault(prompt.key, prompt)
    return list(unique.values())


def make_prompt(text: Text, location: str = "", *, implicit_prompt: bool = False) -> Prompt:
    """Build a prompt from a text (one user turn) or from messages.

    Assistant turns at the end of messages are removed.

    Args:
        text: text or messages.
        location: location of the text or messages in the data, for error messages.
        implicit_prompt: parse a text with turn marks (`Human:`, `Assistant:`) into its turns, as
            training does.

    Raises:
        DataError: the prompt is empty.
    """
    if (
        implicit_prompt
        and isinstance(text, str)
        and (turns := hh_rlhf.parse_turns(text)) is not None
    ):
        return replace(make_prompt(turns, location), text=text)
    turns = to_messages(text, "user")
    while turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    if not turns or not any(str(turn["content"]).strip() for turn in turns):
        raise DataError(f"{location}: the prompt is empty; write a prompt")
    return Prompt(turns, location)


def add_system_prompt(prompts: Iterable[Prompt], system: str | None) -> list[Prompt]:
    """Return the prompts, each with `system` as its system turn unless it has its own.

    If `system` is None, the prompts stay as they are.
    """
    turn: Message = {"role": "system", "content": system}
    return [
        prompt
        if system is None or prompt.messages[0]["role"] in ("system", "developer")
        else replace(prompt, messages=(turn, *prompt.messages))
        for prompt in prompts
    ]


def prepend_system_prompt(prompt: Prompt, system: str) -> Prompt:
    """Return the prompt under a system prompt, which goes before its own system message."""
    first = prompt.messages[0]
    if first["role"] not in ("system", "developer"):
        return add_system_prompt([prompt], system)[0]
    joined: Message = {**first, "content": f"{system}\n\n{first['content']}"}
    return replace(prompt, messages=(joined, *prompt.messages[1:]))


def row_to_prompt(row: Row) -> Prompt:
    """Return the prompt of a row; for a pair it is the prompt that training uses.

    Raises:
        DataError: the row has no prompt, or it has `tools` or `chat_template_kwargs`.
    """
    record = row.record
    for name in ("tools", "chat_template_kwargs"):
        if record.get(name):
            raise _unsupported_field(row.location, name)
    if not record.get("messages") and has_pair_schema(row):
        return _prompt_of_pair(row)
    return _prompt_field(row)


def check_no_template_kwargs(template_kwargs: Mapping[str, Any], location: str) -> None:
    """Raise `DataError` if a row has `tools` or other arguments of the chat template."""
    for name in template_kwargs:
        raise _unsupported_field(location, name)


def _unsupported_field(location: str, name: str) -> DataError:
    return DataError(f"{location}: prompts with `{name}` are not supported here")


def _prompt_of_pair(row: Row) -> Prompt:
    try:
        pairs = parse_pairs(row)
    except BadPairError as bad:
        problem = bad.reason
    else:
        if pairs:
            check_no_template_kwargs(pairs[0].template_kwargs, row.location)
            implicit_prompt = pairs[0].implicit_prompt
            return make_prompt(pairs[0].prompt, row.location, implicit_prompt=implicit_prompt)
        problem = "its answers tie"
    # A bad pair may have a good prompt; completions as messages may contain more of the prompt.
    if row.record.get("prompt") and not isinstance(row.record.get("chosen"), list):
        return _prompt_field(row)
    raise DataError(f"{row.location}: the row has no readable prompt ({problem}); remove the row")


def _prompt_field(row: Row) -> Prompt:
    """Return the prompt from the row's field `prompt` or, if that is absent, `messages`."""
    record = row.record
    for name in ("prompt", "messages"):
        value: Any = record.get(name)
        if value is None or value == "":
            continue
        if get_field_type(value, name, row.location) == "messages":
            return make_prompt(parse_messages(value, name, row.location), row.location)
        prompt = make_prompt(parse_text(value, name, row.location), row.location)
        return add_system_prompt([prompt], _system_field(row))[0]
    raise DataError(
        f"{row.location}: missing `prompt` or `messages` (found {format_names(record)})"
    )


def _system_field(row: Row) -> str | None:
    """Return the row's field `system`, or None if it is empty or the row is labelled.

    Training ignores the field in labelled rows.
    """
    if "label" in row.record:
        return None
    return parse_text(row.record.get("system") or "", "system", row.location) or None


def _read_lines(path: Path) -> Iterator[Prompt]:
    for number, line in enumerate(read_bytes(path, DataError).splitlines(), start=1):
        location = f"{path}:{number}"
        if text := decode(line, location, DataError).strip():
            yield make_prompt(text, location)
