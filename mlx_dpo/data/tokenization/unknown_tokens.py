"""Find characters that a tokenizer does not have: it writes an unknown token, or nothing at all."""

import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from mlx_dpo.data.tokenization.special_tokens import stop_tokens

NEIGHBOR = "a"  # a character in the vocabulary of nearly every tokenizer
NONCHARACTER = "\U0010fffe"  # in no vocabulary
# Normalizers drop control characters, accents and white space on purpose.
IGNORED_CATEGORIES = ("C", "M", "Z")


def count_unknown_tokens(tokenizer: Any, sequences: Iterable[tuple[int, ...]]) -> int:
    """Return how many token ids are the tokenizer's unknown token.

    Some tokenizers have no unknown token, and some use a stop or BOS token as one, which says
    nothing about the text; the result is then 0.
    """
    unknown = _unknown_id(tokenizer)
    if unknown is None or unknown in (*stop_tokens(tokenizer), tokenizer.bos_token_id):
        return 0
    return sum(ids.count(unknown) for ids in sequences)


def find_unknown_characters(tokenizer: Any, texts: Iterable[str]) -> frozenset[str]:
    """Return the characters of the texts that the tokenizer does not have."""
    known = _verdicts(tokenizer)
    characters = set().union(*texts)
    for character in characters - known.keys():
        known[character] = _is_known(tokenizer, character)
    return frozenset(character for character in characters if not known[character])


@lru_cache(maxsize=4)
def _verdicts(tokenizer: Any) -> dict[str, bool]:
    """Return a dictionary to fill: whether the tokenizer has a character."""
    return {}


def _is_known(tokenizer: Any, character: str) -> bool:
    if unicodedata.category(character)[0] in IGNORED_CATEGORIES:
        return True
    without, ids = _encode_between(tokenizer, ""), _encode_between(tokenizer, character)
    unknown = _unknown_id(tokenizer)
    if unknown in without:  # a tokenizer of whole words: one character says nothing
        return True
    return unknown not in ids and ids != without


@lru_cache(maxsize=4)
def _unknown_id(tokenizer: Any) -> int | None:
    """Return the id of the unknown token, also if only the tokenizer's model names it."""
    number = getattr(tokenizer, "unk_token_id", None)
    if isinstance(number, int):
        return number
    without, ids = _encode_between(tokenizer, ""), _encode_between(tokenizer, NONCHARACTER)
    further = set(ids) - set(without)
    # Bytes of a character are several tokens.
    return further.pop() if len(further) == 1 and len(ids) == len(without) + 1 else None


def _encode_between(tokenizer: Any, character: str) -> list[int]:
    return list(tokenizer.encode(NEIGHBOR + character + NEIGHBOR, add_special_tokens=False))
