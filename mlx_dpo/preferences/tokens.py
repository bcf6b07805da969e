"""Preferences -> tokenized pairs: which form, which stop token, how long, which ids."""

from dataclasses import dataclass
from typing import Any

from mlx_dpo.errors import ConfigError, DataError, ModelError
from mlx_dpo.preferences.boundary import (
    Ids,
    chat_rows,
    has_template,
    knows_thinking,
    shown,
    text_rows,
)
from mlx_dpo.preferences.faults import EMPTY, SAME_TOKENS, BadPair
from mlx_dpo.preferences.truncation import truncate
from mlx_dpo.types import Preference, TokenizedPair


@dataclass(frozen=True, kw_only=True)
class TokenRules:
    """The settings under which text becomes tokens."""

    chat_template: str = "auto"
    thinking: bool | None = None
    max_length: int = 1024
    truncation: str = "keep_start"
    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A tokenized pair, and what happened to it on the way."""

    pair: TokenizedPair
    as_chat: bool  # through the model's chat template
    boundary_moved: int  # prompt tokens that merge with a completion and went over to it
    stops_added: int  # completions that had no stop token of their own
    truncated: bool


def check_rules(tokenizer: Any, rules: TokenRules) -> None:
    """Refuse rules that this tokenizer cannot follow.

    Raises:
        ConfigError: a setting needs a chat template, or one with a thinking mode.
        ModelError: the tokenizer has no stop token.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer names no stop token; add `eos_token` to its tokenizer_config.json"
        )
    if rules.chat_template == "chat" and not has_template(tokenizer):
        raise ConfigError(
            "`chat_template` is chat, but the model has no chat template; "
            "take a chat model, or --chat-template text"
        )
    if rules.thinking is not None and not knows_thinking(tokenizer):
        raise ConfigError("`thinking` has no effect; the model has no template with such a mode")


def tokenize_pair(
    tokenizer: Any, preference: Preference, rules: TokenRules, *, is_dialogue: bool = False
) -> Encoded:
    """The pair as token ids, each completion with the stop token that ends it.

    Under `auto`, strings go through the model's chat template, unless they are parts of a
    text that marks its turns itself (`is_dialogue`). Messages always do.

    Raises:
        DataError: the template or the tokenizer does not fit the pair or the model.
        BadPair: nothing to learn is left of the pair.
    """
    where = preference.where
    as_chat = _is_chat(tokenizer, preference, rules, is_dialogue)
    if as_chat:
        rows = chat_rows(tokenizer, preference, thinking=bool(rules.thinking))
    else:
        rows = text_rows(tokenizer, preference)
    stops = stop_tokens(tokenizer)
    (chosen, added), (rejected, also_added) = (
        _ended(tokenizer, completion, stops) for completion in rows.completions
    )
    whole = TokenizedPair(rows.prompt, chosen, rejected, where)
    _check_ids(tokenizer, whole, rules.vocab_size)
    if any(len(ids) == 1 and ids[0] in stops for ids in (chosen, rejected)):
        raise BadPair(where, EMPTY, "once tokenized")
    if chosen == rejected:
        raise BadPair(where, SAME_TOKENS)
    pair = truncate(whole, rules.max_length, rules.truncation)
    return Encoded(
        pair=pair,
        as_chat=as_chat,
        boundary_moved=rows.moved,
        stops_added=added + also_added,
        truncated=pair != whole,
    )


def stop_tokens(tokenizer: Any) -> set[int]:
    """Ids that end a reply; mlx-lm's wrapper knows more of them than the tokenizer does."""
    known = getattr(tokenizer, "eos_token_ids", None)
    # Tokenizers of transformers answer to this name too, with a single id.
    return set(known) if isinstance(known, set | list | tuple) else {tokenizer.eos_token_id}


def _is_chat(tokenizer: Any, preference: Preference, rules: TokenRules, is_dialogue: bool) -> bool:
    if isinstance(preference.prompt, str):
        unmarked = has_template(tokenizer) and not is_dialogue
        return rules.chat_template == "chat" or (rules.chat_template == "auto" and unmarked)
    if rules.chat_template == "text":
        raise DataError(
            f"{preference.where}: messages cannot stay plain text; write the pair as strings, "
            "or leave out --chat-template text"
        )
    if not has_template(tokenizer):
        raise DataError(
            f"{preference.where}: messages need a chat template and the model has none; "
            "take a chat model, or write the pair as strings"
        )
    return True


def _ended(tokenizer: Any, completion: Ids, stops: set[int]) -> tuple[Ids, bool]:
    """The completion up to its stop token, and whether that had to be added."""
    end = next((i + 1 for i in reversed(range(len(completion))) if completion[i] in stops), 0)
    # Templates like to put a newline after the stop token; nobody will ever generate it.
    if end and not tokenizer.decode(list(completion[end:])).strip():
        return completion[:end], False
    return (*completion, tokenizer.eos_token_id), True


def _check_ids(tokenizer: Any, pair: TokenizedPair, vocab_size: int) -> None:
    # MLX checks no bounds: a foreign id would read other memory without a word.
    for token in {*pair.prompt, *pair.chosen, *pair.rejected}:
        if not 0 <= token < vocab_size:
            raise DataError(
                f"{pair.where}: token {token} ({shown(tokenizer, (token,))}) is outside the "
                f"model's vocabulary of {vocab_size}; the tokenizer does not belong to this model"
            )
