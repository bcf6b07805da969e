"""Tokenize special tokens that occur in the text of data or messages as plain text.

Each special token in a text is replaced by a private-use character before the template and the
tokenizer see the text. So only the special tokens that the template writes itself are control
tokens, and no text can imitate a control token.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from mlx_dpo.errors import DataError

FIRST_MARK = 0x100000  # the first of the private-use characters that replace special tokens
CONTEXTS = ("\n", "x", ".")  # texts before a piece that is tokenized as the middle of a text


class NotPlainTextError(DataError):
    """The tokenizer cannot tokenize a special token in a text as plain text."""


class SpecialTokens:
    """The special tokens of a tokenizer, each with the private-use character that replaces it.

    A text with replaced tokens can pass through the chat template; see `encode`.
    """

    def __init__(self, names: Mapping[str, int]) -> None:
        longest_first = sorted(names, key=len, reverse=True)  # the longest match counts
        marks = [chr(FIRST_MARK + i) for i in range(len(longest_first))]
        self.ids = frozenset(names.values())
        self._mark_of = dict(zip(longest_first, marks, strict=True))
        self._name_of = dict(zip(marks, longest_first, strict=True))
        self._name_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._mark_pattern = re.compile(f"([{''.join(marks)}])" if marks else "((?!))")

    def find(self, value: Any) -> set[str]:
        """Return the special tokens in a text, or in the texts of nested messages."""
        return {name for text in iterate_texts(value) for name in self._name_pattern.findall(text)}

    def mark(self, value: Any) -> Any:
        """Replace special tokens in a text or nested messages by private-use characters.

        Roles of messages stay as they are.

        Raises:
            NotPlainTextError: a text already contains one of these private-use characters.
        """
        if isinstance(value, str):
            if self._mark_pattern.search(value):
                raise NotPlainTextError("the text holds private characters and a special token")
            return self._name_pattern.sub(lambda match: self._mark_of[match[0]], value)
        if isinstance(value, Mapping):
            return {
                self.mark(key): item if key == "role" else self.mark(item)
                for key, item in value.items()
            }
        return [self.mark(item) for item in value] if isinstance(value, list | tuple) else value

    def unmark(self, text: str) -> str:
        """Replace the private-use characters in a text by the special tokens they stand for."""
        return self._mark_pattern.sub(lambda match: self._name_of[match[0]], text)

    def encode(self, tokenizer: Any, text: str) -> list[int]:
        """Return the token ids of a text that `mark` returned, with special tokens as plain text.

        Raises:
            NotPlainTextError: the tokenizer always encodes a replaced token as a special token.
        """
        pieces = self._mark_pattern.split(text)
        ids = _plain_encoder(tokenizer)(pieces[0]) if pieces[0] else []
        for index, piece in enumerate(pieces[1:], start=1):
            if index % 2:
                ids += self._encode_name(tokenizer, self._name_of[piece], bool(ids))
            elif piece:
                ids += _encode_inside(_plain_encoder(tokenizer), piece, bool(ids))
        return ids

    def _encode_name(self, tokenizer: Any, name: str, inside: bool) -> list[int]:
        """Return the token ids of a special token's text, such as `<s>`, as ordinary characters.

        `inside`: the name is not at the beginning of the text.
        """
        ids = _encode_inside(_plain_encoder(tokenizer, split=True), name, inside)
        if self.ids & set(ids):  # it ignores `split_special_tokens`: split the name here
            plain = _plain_encoder(tokenizer)
            ids = _encode_inside(plain, name[:1], inside) + _encode_inside(plain, name[1:], True)
        if self.ids & set(ids):
            raise NotPlainTextError(f"the tokenizer has no plain text for `{name}`")
        return ids


@lru_cache(maxsize=4)
def get_special_tokens(tokenizer: Any) -> SpecialTokens:
    """Return the special tokens of a tokenizer, including its stop tokens."""
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
    """Return the ids of the tokens that end a reply; mlx-lm's wrapper may have several."""
    ids = getattr(tokenizer, "eos_token_ids", None)
    # Tokenizers of transformers have this attribute too, with a single id.
    return set(ids) if isinstance(ids, set | list | tuple) else {tokenizer.eos_token_id}


def end_of_stop(tokenizer: Any, ids: tuple[int, ...], stops: set[int]) -> int:
    """Return the index after the last stop token if only white space follows it, otherwise 0.

    Many templates write a newline after the stop token, which generation never reaches.
    """
    end = next((i + 1 for i in reversed(range(len(ids))) if ids[i] in stops), 0)
    return end if end and not tokenizer.decode(list(ids[end:])).strip() else 0


def iterate_texts(value: Any) -> Iterator[str]:
    """Return every string in a text or in nested messages, keys included, except for the roles."""
    texts: list[str] = []
    _collect_texts(value, texts)
    return iter(texts)


def _collect_texts(value: Any, texts: list[str]) -> None:
    if isinstance(value, str):
        texts.append(value)
    elif isinstance(value, list | tuple):  # before mappings, for which this test is slow
        for item in value:
            _collect_texts(item, texts)
    elif isinstance(value, (dict, Mapping)):
        for key, item in value.items():
            _collect_texts(key, texts)
            if key != "role":
                _collect_texts(item, texts)


def _plain_encoder(tokenizer: Any, *, split: bool = False) -> Callable[[str], list[int]]:
    """Return a function that encodes text without BOS and EOS.

    With `split`, the tokenizer is asked to split the names of special tokens.
    """
    options = {"split_special_tokens": True} if split else {}
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False, **options))


def _encode_inside(encode: Callable[[str], list[int]], piece: str, inside: bool) -> list[int]:
    """Return the token ids of a piece of text.

    With `inside`, the piece follows other text, and the tokenizer must not add a space before it.
    """
    if not inside:
        return encode(piece)
    # Some tokenizers add a space at the beginning of a text, so a context is put before the piece.
    for context in CONTEXTS:
        before, both = encode(context), encode(context + piece)
        if both[: len(before)] == before:
            return both[len(before) :]
    raise NotPlainTextError("the tokenizer merges a special token with the text next to it")
