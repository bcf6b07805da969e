"""Tokenize examples: format the text, add stop tokens, truncate, and check the token ids."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from mlx_dpo.data.chat_templates.render import has_template
from mlx_dpo.data.tokenization.chat_template import (
    Ids,
    format_ids,
    has_thinking_mode,
    later_turn_starts,
    split_control_tokens,
    tokenize_as_chat,
    tokenize_as_text,
)
from mlx_dpo.data.tokenization.formatting import FormattedExample, TokenRules, format_example
from mlx_dpo.data.tokenization.special_tokens import (
    end_of_stop,
    get_special_tokens,
    iterate_texts,
    stop_tokens,
)
from mlx_dpo.data.tokenization.unknown_tokens import (
    count_unknown_tokens,
    find_unknown_characters,
)
from mlx_dpo.errors import (
    EMPTY_COMPLETION,
    NO_ROOM,
    SAME_AFTER_TRUNCATION,
    SAME_TOKENS,
    TOO_LONG,
    BadPairError,
    ConfigError,
    DataError,
    ModelError,
)
from mlx_dpo.types import PreferenceExample, TokenizedPair, UnpairedExample


def truncate(
    pair: TokenizedPair,
    max_length: int,
    strategy: str,
    *,
    keep_bos: bool = False,
    turn_starts: Sequence[int] = (),
    can_be_longer: bool = True,
) -> TokenizedPair:
    """Return the pair, truncated to at most `max_length` tokens of prompt + each completion.

    A completion always keeps at least one token.

    Args:
        pair: the pair to truncate.
        max_length: maximum tokens of prompt + completion.
        strategy: `keep_start` cuts the end of completions, as TRL does. `keep_end` cuts the start
            of the prompt, the same for both completions, and cuts completions only if they do not
            fit next to one prompt token. `drop` raises `BadPairError` instead of cutting.
        keep_bos: with `keep_end`, keep the first token of the prompt.
        turn_starts: with `keep_end`, positions in the prompt at which turns begin. The prompt is
            cut at the first position that leaves room for the completions; if there is none, at
            any token.
        can_be_longer: whether the model's context allows a larger `max_length`, for the advice.

    Raises:
        BadPairError: the pair is too long and the strategy is `drop`, the prompt leaves no room
            for a completion, or the completions are equal after truncation.
    """
    if len(pair) <= max_length:
        return pair
    if strategy == "drop":
        raise BadPairError(pair.location, TOO_LONG, f"{len(pair)} tokens, max_length {max_length}")
    advice = length_advice(strategy, can_be_longer=can_be_longer)
    prompt = pair.prompt
    if strategy == "keep_end":
        longest_completion = len(pair) - len(prompt)
        prompt = _cut_start(prompt, max_length, longest_completion, keep_bos, turn_starts)
    room = max_length - len(prompt)
    if room < 1:
        details = f"prompt of {len(prompt)} tokens, max_length {max_length}"
        raise BadPairError(pair.location, NO_ROOM, details, advice=advice)
    cut = replace(pair.cut_completions(room, room), prompt=prompt)
    if cut.chosen == cut.rejected:
        details = f"max_length {max_length}"
        raise BadPairError(pair.location, SAME_AFTER_TRUNCATION, details, advice=advice)
    return cut


def length_advice(strategy: str, *, can_be_longer: bool) -> str:
    """Return what to do about rows that are too long, as far as strategy and context allow it."""
    ways = ["use --truncation keep_end"] * (strategy != "keep_end")
    ways += ["raise --max-length"] * can_be_longer
    return " or ".join(ways) or "shorten the row"


def _cut_start(
    prompt: Ids,
    max_length: int,
    longest_completion: int,
    keep_bos: bool,
    turn_starts: Sequence[int],
) -> Ids:
    # A row needs the BOS token, one more token of the prompt and one of a completion.
    bos = prompt[: int(keep_bos and max_length > 2)]
    remaining = max(1, max_length - longest_completion - len(bos))
    if remaining + len(bos) >= len(prompt):
        return prompt
    earliest = len(prompt) - remaining
    return bos + prompt[next((start for start in turn_starts if start >= earliest), earliest) :]


@dataclass(frozen=True, kw_only=True)
class TokenizedExample:
    """A tokenized pair, with facts about its tokenization, such as whether it was truncated."""

    pair: TokenizedPair
    as_chat: bool  # tokenized with the chat template
    was_dialogue: bool  # the text had turn marks, which became messages
    with_system: bool  # begins with the system turn of the settings
    specials: frozenset[str]  # special tokens in its text
    boundary_moved: int  # prompt tokens that merge with a completion and were moved to it
    stops_added: int  # completions that had no stop token
    prompt_cut: bool
    completions_cut: int
    unwritten: frozenset[str] = frozenset()  # parts without a trace in the chat template
    unknown_characters: frozenset[str] = frozenset()  # that the tokenizer does not have
    unknown_tokens: int = 0

    @property
    def has_unknown(self) -> bool:
        """True if the tokenizer does not have all characters or words of the text."""
        return bool(self.unknown_characters) or self.unknown_tokens > 0

    @property
    def truncated(self) -> bool:
        """True if the prompt or a completion was cut."""
        return self.prompt_cut or self.completions_cut > 0


def check_token_rules(tokenizer: Any, rules: TokenRules) -> None:
    """Check that the tokenizer supports the tokenization settings.

    Raises:
        ConfigError: a setting needs a chat template or a thinking mode, and there is none.
        ModelError: the tokenizer has no stop token.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer defines no stop token; add `eos_token` to its tokenizer_config.json"
        )
    if rules.chat_template == "chat" and not has_template(tokenizer):
        raise ConfigError(
            "`chat_template` is chat, but the model has no chat template; "
            "use a chat model, or --chat-template text"
        )
    if rules.thinking is not None and not has_thinking_mode(tokenizer):
        raise ConfigError(
            "`thinking` has no effect; the model's chat template has no thinking mode"
        )


def tokenize_pair(
    tokenizer: Any, example: PreferenceExample, rules: TokenRules
) -> TokenizedExample:
    """Tokenize a preference pair; each completion ends with a stop token.

    With `chat_template` auto, messages and strings are put into the chat template. A pair
    with an implicit prompt (the common prefix of both texts) stays text, unless it has turn marks
    (`Human:`).

    Raises:
        DataError: the template or the tokenizer does not fit the pair or the model.
        BadPairError: the pair cannot be trained on.
    """
    parts = _tokenize(tokenizer, example, rules)
    chosen, rejected = parts.completions[0], parts.completions[-1]
    if chosen == rejected:
        raise BadPairError(example.location, SAME_TOKENS)
    whole = TokenizedPair(parts.prompt, chosen, rejected, example.location)
    return _truncate(tokenizer, whole, parts, rules, stops_added=sum(parts.stops_added))


def tokenize_unpaired(
    tokenizer: Any, example: UnpairedExample, rules: TokenRules
) -> TokenizedExample:
    """Tokenize an unpaired example: its completion becomes `chosen`, `rejected` stays empty.

    Raises:
        DataError, BadPairError: as `tokenize_pair`.
    """
    completion = example.completion
    pair = PreferenceExample(
        example.prompt,
        completion,
        completion,
        example.location,
        example.template_kwargs,
        example.implicit_prompt,
    )
    parts = _tokenize(tokenizer, pair, rules)
    whole = TokenizedPair(
        parts.prompt,
        parts.completions[0],
        (),
        example.location,
        desirable=example.desirable,
        gaps=parts.gaps,
    )
    return _truncate(tokenizer, whole, parts, rules, stops_added=parts.stops_added[0])


class _Parts(NamedTuple):
    formatted: FormattedExample
    prompt: Ids
    completions: tuple[Ids, ...]  # each with its stop token; one if both texts are equal
    stops_added: tuple[bool, ...]
    moved: int
    unwritten: frozenset[str]
    gaps: tuple[tuple[int, int], ...]


def _tokenize(tokenizer: Any, example: PreferenceExample, rules: TokenRules) -> _Parts:
    """Tokenize prompt and completions before truncation; check that their ids are valid."""
    formatted = format_example(tokenizer, example, rules)
    example = formatted.example
    if formatted.as_chat:
        parts = tokenize_as_chat(tokenizer, example, thinking=formatted.thinking)
    else:
        parts = tokenize_as_text(tokenizer, example, controls=rules.chat_template == "text")
    stops = stop_tokens(tokenizer)
    completions, added = zip(
        *(_end_with_stop(tokenizer, completion, stops) for completion in parts.completions),
        strict=True,
    )
    _check_ids(tokenizer, (parts.prompt, *completions), example.location, rules.vocab_size)
    if any(len(ids) == 1 and ids[0] in stops for ids in completions):
        raise BadPairError(example.location, EMPTY_COMPLETION, "once tokenized")
    return _Parts(
        formatted, parts.prompt, completions, added, parts.moved, parts.unwritten, parts.gaps
    )


def _truncate(
    tokenizer: Any, whole: TokenizedPair, parts: _Parts, rules: TokenRules, *, stops_added: int
) -> TokenizedExample:
    formatted, turn_starts = parts.formatted, list[int]()
    if rules.truncation == "keep_end" and formatted.as_chat and len(whole) > rules.max_length:
        turn_starts = later_turn_starts(tokenizer, formatted.example, thinking=formatted.thinking)
    keep_bos = whole.prompt[0] == tokenizer.bos_token_id
    pair = truncate(
        whole,
        rules.max_length,
        rules.truncation,
        keep_bos=keep_bos,
        turn_starts=turn_starts,
        can_be_longer=rules.can_be_longer,
    )
    return TokenizedExample(
        pair=pair,
        as_chat=formatted.as_chat,
        was_dialogue=formatted.was_dialogue,
        with_system=formatted.with_system,
        specials=_find_special_tokens(tokenizer, formatted),
        boundary_moved=parts.moved,
        stops_added=stops_added,
        prompt_cut=pair.prompt != whole.prompt,
        completions_cut=(pair.chosen != whole.chosen) + (pair.rejected != whole.rejected),
        unwritten=parts.unwritten,
        unknown_characters=find_unknown_characters(tokenizer, _texts(formatted.example)),
        unknown_tokens=count_unknown_tokens(tokenizer, (pair.prompt, pair.chosen, pair.rejected)),
    )


def _texts(example: PreferenceExample) -> list[str]:
    parts = [example.prompt, example.chosen, example.rejected, example.template_kwargs]
    return list(iterate_texts(parts))


def _find_special_tokens(tokenizer: Any, formatted: FormattedExample) -> frozenset[str]:
    """Return the special tokens in the example's text.

    A BOS token at the start and a stop token at the end of plain text do not count.
    """
    example, specials = formatted.example, get_special_tokens(tokenizer)
    if formatted.as_chat:
        texts = [example.prompt, example.chosen, example.rejected, example.template_kwargs]
        return frozenset(specials.find(texts))
    wholes = (f"{example.prompt}{text}" for text in (example.chosen, example.rejected))
    inner = [split_control_tokens(tokenizer, whole, ends=True)[1] for whole in wholes]
    return frozenset(specials.find(inner))


def _end_with_stop(tokenizer: Any, completion: Ids, stops: set[int]) -> tuple[Ids, bool]:
    """Return the completion with a final stop token, and True if this token was added.

    White space after an existing stop token is removed.
    """
    if end := end_of_stop(tokenizer, completion, stops):
        return completion[:end], False
    return (*completion, tokenizer.eos_token_id), True


def _check_ids(tokenizer: Any, parts: Sequence[Ids], location: str, vocab_size: int | None) -> None:
    # MLX does not check bounds: an id outside the vocabulary would read other memory.
    for token in set().union(*parts):
        if vocab_size is not None and not 0 <= token < vocab_size:
            raise DataError(
                f"{location}: token {token} ({format_ids(tokenizer, (token,))}) is outside the "
                f"model's vocabulary of {vocab_size}; the tokenizer does not belong to this model"
            )
