"""Preferences -> tokenized pairs: which form, which stop token, how long, which ids."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from mlx_dpo.data.tokenization.chat_template import (
    FormattedPreference,
    Ids,
    TokenRules,
    format_ids,
    format_preference,
    has_template,
    has_thinking_mode,
    later_turn_starts,
    split_control_tokens,
    tokenize_as_chat,
    tokenize_as_text,
)
from mlx_dpo.data.tokenization.special_tokens import get_special_tokens, stop_tokens
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
    how: str,
    *,
    begins: bool = False,
    turns: Sequence[int] = (),
) -> TokenizedPair:
    """The pair with prompt + completion of at most `max_length` tokens in both rows.

    `keep_start` cuts completions at their end, as TRL does. `keep_end` cuts the prompt at its
    start, the same in both rows, and completions only where they do not fit beside one
    prompt token. `drop` cuts nothing. No completion is ever emptied.

    With `keep_end` the prompt goes on at the first of `turns`, places where one begins, that
    leaves room for the completions; where none does, at any token. If the prompt `begins` with
    the token that begins a text, that token stays.

    Raises:
        BadPairError: there is no such pair, or the cut leaves no difference.
    """
    if len(pair) <= max_length:
        return pair
    if how == "drop":
        raise BadPairError(pair.location, TOO_LONG, f"{len(pair)} tokens, max_length {max_length}")
    prompt = pair.prompt
    if how == "keep_end":
        longest_completion = len(pair) - len(prompt)
        prompt = _end_of_prompt(prompt, max_length, longest_completion, begins, turns)
    room = max_length - len(prompt)
    if room < 1:
        found = f"prompt of {len(prompt)} tokens, max_length {max_length}"
        raise BadPairError(pair.location, NO_ROOM, found, advice="raise --max-length")
    cut = replace(pair, prompt=prompt, chosen=pair.chosen[:room], rejected=pair.rejected[:room])
    if cut.chosen == cut.rejected:
        found = f"max_length {max_length}"
        raise BadPairError(pair.location, SAME_AFTER_TRUNCATION, found, advice="raise --max-length")
    return cut


def _end_of_prompt(
    prompt: tuple[int, ...],
    max_length: int,
    longest_completion: int,
    begins: bool,
    turns: Sequence[int],
) -> tuple[int, ...]:
    # One token that begins, one of the prompt and one of a completion are the least.
    start = prompt[: int(begins and max_length > 2)]
    kept = max(1, max_length - longest_completion - len(start))
    if kept + len(start) >= len(prompt):
        return prompt
    earliest = len(prompt) - kept
    return start + prompt[next((turn for turn in turns if turn >= earliest), earliest) :]


@dataclass(frozen=True, kw_only=True)
class TokenizedExample:
    """A tokenized pair, and what happened to it on the way."""

    pair: TokenizedPair
    as_chat: bool  # through the model's chat template
    was_dialogue: bool  # text that marks its turns, which became messages
    with_system: bool
    specials: frozenset[str]  # special tokens that stand in its text
    boundary_moved: int  # prompt tokens that merge with a completion and went over to it
    stops_added: int  # completions that had no stop token of their own
    prompt_cut: bool
    completions_cut: int

    @property
    def truncated(self) -> bool:
        """Whether anything was cut."""
        return self.prompt_cut or self.completions_cut > 0


def check_token_rules(tokenizer: Any, rules: TokenRules) -> None:
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
    if rules.thinking is not None and not has_thinking_mode(tokenizer):
        raise ConfigError("`thinking` has no effect; the model has no template with such a mode")


def tokenize_pair(
    tokenizer: Any, preference: PreferenceExample, rules: TokenRules
) -> TokenizedExample:
    """The pair as token ids, each completion with the stop token that ends it.

    Under `auto`, strings go through the model's chat template, unless they are parts of a
    whole text; if that marks its turns, these do. Messages always do.

    Raises:
        DataError: the template or the tokenizer does not fit the pair or the model.
        BadPairError: nothing to learn is left of the pair.
    """
    parts = _parts(tokenizer, preference, rules)
    chosen, rejected = parts.completions
    if chosen == rejected:
        raise BadPairError(preference.location, SAME_TOKENS)
    whole = TokenizedPair(parts.prompt, chosen, rejected, preference.location)
    return _encoded(tokenizer, whole, parts, rules, stops_added=sum(parts.stops_added))


def tokenize_unpaired(
    tokenizer: Any, judgement: UnpairedExample, rules: TokenRules
) -> TokenizedExample:
    """A judged answer as token ids: `chosen` is the answer, `rejected` is left empty.

    Raises:
        DataError, BadPairError: as for a pair.
    """
    answer = judgement.completion
    twice = PreferenceExample(
        judgement.prompt,
        answer,
        answer,
        judgement.location,
        judgement.template_kwargs,
        judgement.implicit_prompt,
    )
    parts = _parts(tokenizer, twice, rules)
    answer_ids = parts.completions[0]
    whole = TokenizedPair(
        parts.prompt, answer_ids, (), judgement.location, desirable=judgement.desirable
    )
    return _encoded(tokenizer, whole, parts, rules, stops_added=parts.stops_added[0])


class _Parts(NamedTuple):
    form: FormattedPreference
    prompt: Ids
    completions: tuple[Ids, ...]  # each with the stop token that ends it
    stops_added: tuple[bool, ...]
    moved: int


def _parts(tokenizer: Any, given: PreferenceExample, rules: TokenRules) -> _Parts:
    """Prompt and completions as ids that the model knows, neither of them empty."""
    form = format_preference(tokenizer, given, rules)
    said = form.said
    if form.as_chat:
        rows = tokenize_as_chat(tokenizer, said, thinking=form.thinking)
    else:
        rows = tokenize_as_text(tokenizer, said, controls=rules.chat_template == "text")
    stops = stop_tokens(tokenizer)
    completions, added = zip(
        *(_ended(tokenizer, completion, stops) for completion in rows.completions), strict=True
    )
    _check_ids(tokenizer, (rows.prompt, *completions), said.location, rules.vocab_size)
    if any(len(ids) == 1 and ids[0] in stops for ids in completions):
        raise BadPairError(said.location, EMPTY_COMPLETION, "once tokenized")
    return _Parts(form, rows.prompt, completions, added, rows.moved)


def _encoded(
    tokenizer: Any, whole: TokenizedPair, parts: _Parts, rules: TokenRules, *, stops_added: int
) -> TokenizedExample:
    form, turns = parts.form, list[int]()
    if rules.truncation == "keep_end" and form.as_chat and len(whole) > rules.max_length:
        turns = later_turn_starts(tokenizer, form.said, thinking=form.thinking)
    begins = whole.prompt[0] == tokenizer.bos_token_id
    pair = truncate(whole, rules.max_length, rules.truncation, begins=begins, turns=turns)
    return TokenizedExample(
        pair=pair,
        as_chat=form.as_chat,
        was_dialogue=form.was_dialogue,
        with_system=form.with_system,
        specials=_specials(tokenizer, form),
        boundary_moved=parts.moved,
        stops_added=stops_added,
        prompt_cut=pair.prompt != whole.prompt,
        completions_cut=(pair.chosen != whole.chosen) + (pair.rejected != whole.rejected),
    )


def _specials(tokenizer: Any, form: FormattedPreference) -> frozenset[str]:
    """Special tokens that somebody typed; not those that frame a plain text."""
    said, specials = form.said, get_special_tokens(tokenizer)
    if form.as_chat:
        return frozenset(
            specials.found([said.prompt, said.chosen, said.rejected, said.template_kwargs])
        )
    wholes = (f"{said.prompt}{text}" for text in (said.chosen, said.rejected))
    inner = [split_control_tokens(tokenizer, whole, ends=True)[1] for whole in wholes]
    return frozenset(specials.found(inner))


def _ended(tokenizer: Any, completion: Ids, stops: set[int]) -> tuple[Ids, bool]:
    """The completion up to its stop token, and whether that had to be added."""
    end = next((i + 1 for i in reversed(range(len(completion))) if completion[i] in stops), 0)
    # Templates like to put a newline after the stop token; nobody will ever generate it.
    if end and not tokenizer.decode(list(completion[end:])).strip():
        return completion[:end], False
    return (*completion, tokenizer.eos_token_id), True


def _check_ids(tokenizer: Any, parts: Sequence[Ids], location: str, vocab_size: int | None) -> None:
    # MLX checks no bounds: a foreign id would read other memory without a word.
    for token in set().union(*parts):
        if vocab_size is not None and not 0 <= token < vocab_size:
            raise DataError(
                f"{location}: token {token} ({format_ids(tokenizer, (token,))}) is outside the "
                f"model's vocabulary of {vocab_size}; the tokenizer does not belong to this model"
            )
