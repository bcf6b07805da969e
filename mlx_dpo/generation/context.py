"""The context length of a model, and how long a prompt and an answer may be within it."""

from collections.abc import Mapping
from typing import Any

from mlx_dpo.errors import ConfigError

CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length")


def context_length(config: Mapping[str, Any]) -> int | None:
    """Return the context length that a model's `config.json` states, or None."""
    for part in (config, config.get("text_config") or {}):
        for name in CONTEXT_NAMES:
            if length := part.get(name):
                return int(length)
    return None


def answer_room(location: str, prompt_tokens: int, max_tokens: int, context: int | None) -> int:
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
            f"{location}: {prompt_tokens:,} tokens leave no room for an answer (the model's "
            f"context is {context:,} tokens); shorten it or leave it out"
        )
    return min(max_tokens, context - prompt_tokens)
