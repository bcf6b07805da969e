"""Answers as batches of tokens: encode, sample and score them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlx_dpo import load_policy
from scripts.studies.toy.exact import OTHER
from scripts.studies.toy.words import END, SPECIAL, Words


class AnswerTokens(NamedTuple):
    """Answers to prompts of one length, with the same number T of tokens each.

    Attributes:
        tokens: prompt and answer; what follows the answer's end has no meaning. (B, P + T)
        mask: 1 for the tokens of the answer up to its end, 0 after it. (B, T)
    """

    tokens: mx.array
    mask: mx.array

    @property
    def answers(self) -> mx.array:
        """The tokens of the answers. (B, T)"""
        return self.tokens[:, -self.mask.shape[1] :]

    def take(self, rows: Sequence[int]) -> "AnswerTokens":
        """Return some of the rows."""
        index = mx.array(list(rows))
        return AnswerTokens(self.tokens[index], self.mask[index])

    def count(self) -> int:
        """Return the number of answer tokens, ends included."""
        return int(self.mask.sum().item())


def encode_answers(
    vocabulary: Words, prompts: Sequence[str], answers: Sequence[str], length: int
) -> AnswerTokens:
    """Encode answers to prompts of one length, padded to `length` tokens."""
    starts = [vocabulary.prompt_ids(prompt) for prompt in prompts]
    ids = [vocabulary.answer_ids(answer) for answer in answers]
    padded = [
        start + row + [END] * (length - len(row)) for start, row in zip(starts, ids, strict=True)
    ]
    mask = np.arange(length) < np.array([[len(row)] for row in ids])
    return AnswerTokens(mx.array(padded), mx.array(mask.astype(np.float32)))


def decode_answers(vocabulary: Words, batch: AnswerTokens) -> list[str]:
    """Return the texts of answers; `OTHER` for those without an end or with special tokens."""
    names, texts = {index: word for word, index in vocabulary.ids.items()}, []
    for tokens in batch.answers.tolist():
        words = tokens[: tokens.index(END)] if END in tokens else []
        is_text = bool(words) and all(token >= len(SPECIAL) for token in words)
        texts.append(" ".join(names[token] for token in words) if is_text else OTHER)
    return texts


def sample_answers(model: nn.Module, prompts: mx.array, length: int, key: mx.array) -> AnswerTokens:
    """Sample an answer of at most `length` tokens to each prompt (B, P), at temperature 1."""
    cache, tokens, last = make_prompt_cache(model), [prompts], prompts
    for layer in cache:
        layer.step = prompts.shape[1] + length  # positions, all of which are used
    for draw in mx.random.split(key, length):
        logits = model(last, cache=cache)[:, -1]
        last = mx.random.categorical(logits.astype(mx.float32), key=draw)[:, None]
        tokens.append(last)
    answers = mx.concatenate(tokens[1:], axis=1)
    ended_before = mx.cumsum(answers == END, axis=1) - (answers == END)
    mask = (ended_before == 0).astype(mx.float32)
    return AnswerTokens(mx.concatenate([prompts, answers], axis=1), mask)


def token_logps(model: nn.Module, batch: AnswerTokens) -> mx.array:
    """Return log π of each token of the answers, 0 after their ends. (B, T)"""
    length = batch.mask.shape[1]
    logits = model(batch.tokens[:, :-1])[:, -length:].astype(mx.float32)
    chosen = mx.take_along_axis(logits, batch.answers[..., None], axis=-1)[..., 0]
    return (chosen - mx.logsumexp(logits, axis=-1)) * batch.mask


def load_trainable(folder: Path) -> nn.Module:
    """Load a checkpoint of which the blocks are trained, as in the package's full fine-tuning."""
    model: nn.Module = load_policy(None, model=str(folder)).model
    model.freeze()
    for block in model.layers:
        block.unfreeze()
    return model


class ScalarModel(nn.Module):
    """A language model with a linear head instead of its LM head: one number per token.

    The head begins at zero, so that all values and rewards do.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        model = load_trainable(folder)
        self.trunk = model.model
        self.head = nn.Linear(model.args.hidden_size, 1)
        self.head.weight = mx.zeros_like(self.head.weight)
        self.head.bias = mx.zeros_like(self.head.bias)

    def __call__(self, tokens: mx.array) -> mx.array:
        """Return a number for each prefix of the rows. (B, L) to (B, L)"""
        return self.head(self.trunk(tokens))[..., 0]
