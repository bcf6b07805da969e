"""A model and rows with stated content -> how many answers are right, how many courteous."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from mlx_dpo.demo.rules import is_correct, is_courteous
from scripts.tools.tiny_chat.rules import COURTEOUS_MARKERS

LONGEST_ANSWER = 40
Row = Mapping[str, Any]


def answers(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    temperature: float = 0.0,
    size: int = 64,
    longest: int = LONGEST_ANSWER,
) -> list[str]:
    """One answer to the prompt of each row. Prompts of equal length share a batch.

    An answer ends after `longest` tokens.
    """
    prompts = [
        tokenizer.apply_chat_template(
            list(row["prompt"]), add_generation_prompt=True, return_dict=False
        )
        for row in rows
    ]
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)
    found = [""] * len(rows)
    for indices in by_length.values():
        for start in range(0, len(indices), size):
            group = indices[start : start + size]
            ids = mx.array([prompts[index] for index in group])
            written = _generate(model, ids, tokenizer.eos_token_id, temperature, longest)
            for index, tokens in zip(group, written, strict=True):
                found[index] = tokenizer.decode(tokens)
    return found


def _generate(
    model: Any, ids: mx.array, stop: int, temperature: float, longest: int
) -> list[list[int]]:
    """Answers to prompts of one length. (N, T) -> N lists of tokens without the stop token."""
    cache = make_prompt_cache(model)
    columns: list[mx.array] = []
    ended = mx.zeros(ids.shape[0], dtype=mx.bool_)
    for _ in range(longest):
        logits = model(ids, cache=cache)[:, -1].astype(mx.float32)
        if temperature:
            token = mx.random.categorical(logits / temperature)
        else:
            token = mx.argmax(logits, axis=-1)
        columns.append(token)
        ended = ended | (token == stop)
        if ended.all().item():
            break
        ids = token[:, None]
    written: list[list[int]] = mx.stack(columns, axis=1).tolist()  # type: ignore[assignment]
    return [row[: row.index(stop)] if stop in row else row for row in written]


def content_by_topic(rows: Sequence[Row], texts: Sequence[str]) -> dict[str, float]:
    """The share of right answers: each topic, then all rows as `all`."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for row, text in zip(rows, texts, strict=True):
        hits[row["topic"]].append(is_correct(text, row))
    shares = {topic: sum(right) / len(right) for topic, right in sorted(hits.items())}
    return shares | {"all": sum(map(sum, hits.values())) / len(rows)}


def courteous_share(texts: Sequence[str]) -> float:
    return sum(is_courteous(text, COURTEOUS_MARKERS) for text in texts) / len(texts)
