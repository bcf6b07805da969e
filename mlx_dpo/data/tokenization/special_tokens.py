"""Special tokens that somebody typed: they stay the characters that they are.

What a text holds of them is marked before a template or a tokenizer sees it. So the tokens
that a template writes itself remain control tokens, and no text can forge one.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from mlx_dpo.errors import DataError

FIRST_MARK = 0x100000  # characters that Unicode leaves to private use
CONTEXTS = ("\n", "x", ".")  # after which a piece is encoded that begins no text


class NotPlainTextError(DataError):
    """A text with a special token in it that this tokenizer cannot write as plain text."""


class SpecialTokens:
    """The special tokens of a tokenizer, each with a character that stands for it."""

    def __init__(self, names: Mapping[str, int]) -> None:
        longest_first = sorted(names, key=len, reverse=True)  # the longest that fits is meant
        marks = [chr(FIRST_MARK + i) for i in range(len(longest_first))]
        self.ids = frozenset(names.values())
        self._mark = dict(zip(longest_first, marks, strict=True))
        self._name = dict(zip(marks, longest_first, strict=True))
        self._written = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._marked = re.compile(f"([{''.join(marks)}])" if marks else "((?!))")

    def found(self, value: Any) -> set[str]:
        """Those that stand in a text, or in any text of nested messages."""
        return {name for text in iterate_texts(value) for name in self._written.findall(text)}

    def marked(self, value: Any) -> Any:
        """The same value with marks in their places; roles are the template's business.

        Raises:
            NotPlainTextError: a text holds the characters of marks already.
        """
        if isinstance(value, str):
            if self._marked.search(value):
                raise NotPlainTextError("the text holds private characters beside a special token")
            return self._written.sub(lambda match: self._mark[match[0]], value)
        if isinstance(value, Mapping):
            return {k: v if k == "role" else self.marked(v) for k, v in value.items()}
        return [self.marked(one) for one in value] if isinstance(value, list | tuple) else value

    def unmarked(self, text: str) -> str:
        """The text as it was."""
        return self._marked.sub(lambda match: self._name[match[0]], text)

    def encode(self, tokenizer: Any, text: str) -> list[int]:
        """Ids of a marked text: what is marked as plain text, everything else as ever.

        Raises:
            NotPlainTextError: the tokenizer makes a special token of its name whatever it is asked.
        """
        pieces = self._marked.split(text)
        ids = _plain(tokenizer)(pieces[0]) if pieces[0] else []
        for at, piece in enumerate(pieces[1:], start=1):
            if at % 2:
                ids += self._literal(tokenizer, self._name[piece], bool(ids))
            elif piece:
                ids += _continued(_plain(tokenizer), piece, bool(ids))
        return ids

    def _literal(self, tokenizer: Any, name: str, inside: bool) -> list[int]:
        ids = _continued(_plain(tokenizer, split=True), name, inside)
        if self.ids & set(ids):  # it does not split them: then they are never seen whole
            plain = _plain(tokenizer)
            ids = _continued(plain, name[:1], inside) + _continued(plain, name[1:], True)
        if self.ids & set(ids):
            raise NotPlainTextError(f"the tokenizer has no plain text for `{name}`")
        return ids


@lru_cache(maxsize=4)
def get_special_tokens(tokenizer: Any) -> SpecialTokens:
    """The control tokens of a tokenizer: the special ones, and those that end a reply."""
    names: dict[str, int] = {}
    for token in getattr(tokenizer, "all_special_tokens", ()):
        names[str(token)] = tokenizer.convert_tokens_to_ids(str(token))
    for number, token in getattr(tokenizer, "added_tokens_decoder", {}).items():
        if token.special:
            names[token.content] = number
    for number in stop_tokens(tokenizer):
        token = tokenizer.convert_ids_to_tokens(number)
        if isinstance(token, str):
            names[token] = number
    return SpecialTokens({name: number for name, number in names.items() if name.strip()})


def stop_tokens(tokenizer: Any) -> set[int]:
    """Ids that end a reply; mlx-lm's wrapper knows more of them than the tokenizer does."""
    known = getattr(tokenizer, "eos_token_ids", None)
    # Tokenizers of transformers answer to this name too, with a single id.
    return set(known) if isinstance(known, set | list | tuple) else {tokenizer.eos_token_id}


def iterate_texts(value: Any) -> Iterator[str]:
    """Every text in a value but for roles."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key != "role":
                yield from iterate_texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from iterate_texts(item)


def _plain(tokenizer: Any, *, split: bool = False) -> Callable[[str], list[int]]:
    more = {"split_special_tokens": True} if split else {}
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False, **more))


def _continued(encode: Callable[[str], list[int]], piece: str, inside: bool) -> list[int]:
    """Ids of a piece that stands within a text: some tokenizers put a space before a beginning."""
    if not inside:
        return encode(piece)
    for seam in CONTEXTS:
        before, both = encode(seam), encode(seam + piece)
        if both[: len(before)] == before:
            return both[len(before) :]
    raise NotPlainTextError("the tokenizer joins what stands beside a special token with it")
