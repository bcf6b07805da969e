"""Answers to many prompts at once."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from mlx_dpo.policy.batched import complete
from mlx_dpo.policy.generation import check_thinking, prompt_tokens, text_of
from mlx_dpo.policy.sampling import Sampling
from mlx_dpo.types import Message


class Reply(NamedTuple):
    """What a model said to a conversation."""

    text: str
    is_cut: bool  # it would have gone on


def generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[Message]],
    *,
    sampling: Sampling,
    thinking: bool | None = None,
) -> list[str]:
    """One answer for each conversation, in order; see `reply_batch`."""
    replies = reply_batch(model, tokenizer, prompts, sampling=sampling, thinking=thinking)
    return [reply.text for reply in replies]


def reply_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[Message]],
    *,
    sampling: Sampling,
    thinking: bool | None = None,
) -> list[Reply]:
    """One answer for each conversation, in order, as `policy.batched` completes them.

    Raises:
        ConfigError: `thinking` is set and the chat template knows no such mode.
        ModelError: the chat template refuses a conversation.
    """
    if thinking is not None:
        check_thinking(tokenizer)
    rows = [prompt_tokens(tokenizer, messages, thinking=thinking) for messages in prompts]
    said = complete(model, tokenizer.eos_token_ids, rows, sampling)
    return [Reply(text_of(tokenizer, one.tokens), one.end is None) for one in said]
