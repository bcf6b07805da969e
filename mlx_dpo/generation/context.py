"""The context length of a model, and how long a prompt and an answer may be within it.

MLX checks no bounds: a model with a table of learned positions reads other memory beyond the end of
the table. Whatever runs a model on tokens takes its limits from here.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mlx_dpo.errors import ConfigError

# The model stopped, `max_tokens` was reached, or the context was full.
FinishReason = Literal["stop", "length", "context"]
CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length")
# mlx-lm's architectures with a table of learned positions, by the setting with its length.
LEARNED_POSITIONS = {"gpt2": "n_positions", "gpt_bigcode": "n_positions"}


def context_length(config: Mapping[str, Any]) -> int | None:
    """Return the context length that a model's `config.json` states, or None."""
    if (positions := learned_positions(config)) is not None:
        return positions
    for part in (config, config.get("text_config") or {}):
        for name in CONTEXT_NAMES:
            if length := part.get(name):
                return int(length)
    return None


def learned_positions(config: Mapping[str, Any]) -> int | None:
    """Return the number of positions that the model has learned; None if it computes positions."""
    name = LEARNED_POSITIONS.get(str(config.get("model_type")))
    return None if name is None else int(config[name])


def check_max_length(max_length: int, config: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if rows of `max_length` tokens go beyond the model's learned positions.

    Rotary positions have no end, so for other models the longest row decides.
    """
    positions = learned_positions(config)
    if positions is not None and max_length > positions:
        raise ConfigError(
            f"`max_length` is {max_length:,}, but the model has learned {positions:,} positions; "
            f"use --max-length {positions}"
        )


def max_answer_tokens(
    location: str, prompt_tokens: int, max_tokens: int, context: int | None
) -> int:
    """Return the largest number of tokens of an answer: `max_tokens`, or what the context leaves.

    Args:
        location: The prompt's name or place, which begins the error message.
        prompt_tokens: Length of the prompt in tokens.
        max_tokens: Length of the answer that was requested.
        context: The model's context length in tokens; None for no limit.

    Raises:
        ConfigError: the prompt leaves no room for an answer.
    """
    if context is None:
        return max_tokens
    if prompt_tokens >= context:
        raise ConfigError(
            f"{location}: {prompt_tokens:,} tokens leave no room for an answer (the context is "
            f"{context:,} tokens); shorten the prompt or leave it out"
        )
    return min(max_tokens, context - prompt_tokens)


def clip_note(prompt_lengths: Sequence[int], max_tokens: int, context: int | None) -> str | None:
    """Return a note if the context leaves less than `max_tokens` for some answers, else None."""
    longest = max(prompt_lengths, default=0)
    if context is None or longest + max_tokens <= context:
        return None
    return (
        f"The model's context is {context:,} tokens, so some answers are limited to fewer than "
        f"{max_tokens:,} tokens: the longest prompt ({longest:,} tokens) leaves room for "
        f"{max(0, context - longest):,}"
    )
