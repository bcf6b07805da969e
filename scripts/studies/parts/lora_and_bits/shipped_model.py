"""Measure policies that started from the shipped model, on its held-out pairs and prompts.

Log-probs are computed from logits in float64, on token ids of transformers' own chat template,
without the package's tokenization and scorers.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.prompts import make_prompt
from mlx_dpo.data.sources import read_rows
from mlx_dpo.demo.rules import courteous_markers, is_correct, is_courteous
from mlx_dpo.models.load import LoadedModel
from mlx_dpo.paths import tiny_chat
from mlx_dpo.saved_runs.respond import ModelResponder
from scripts.studies.toy.exact import normalize

ROWS_PER_PASS = 40
LONGEST_ANSWER = 40  # tokens of a sampled answer; the longest held-out one has 29


class Text(NamedTuple):
    """Token ids of a prompt and of its answer, with the end."""

    prompt: list[int]
    answer: list[int]


class Answers(NamedTuple):
    """Sampled answers to the held-out prompts: their tokens, and what the true rules say."""

    texts: list[Text]
    courteous: np.ndarray  # (n,) bool
    correct: np.ndarray  # (n,) bool


@cache
def preferences(split: str) -> list[dict[str, Any]]:
    """Return the rows of the shipped preferences, `train` or `valid`."""
    return [row.record for row in read_rows(tiny_chat() / "preferences" / f"{split}.jsonl")]


def tokenize(tokenizer: Any, rows: Iterable[dict[str, Any]], completion: str) -> list[Text]:
    """Return the token ids of a completion of each row, `chosen` or `rejected`."""
    texts = []
    for row in rows:
        start = _chat_ids(tokenizer, row["prompt"], add_generation_prompt=True)
        whole = _chat_ids(tokenizer, row["prompt"] + row[completion], add_generation_prompt=False)
        assert whole[: len(start)] == start
        texts.append(Text(start, whole[len(start) :]))
    return texts


def _chat_ids(tokenizer: Any, messages: list[dict[str, str]], **settings: bool) -> list[int]:
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **settings)
    return list(map(int, ids))


def token_logps(model: nn.Module, texts: Sequence[Text]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the index of each text, and the log-probs of all tokens at each place of its answer.

    The log-probs have the shape (tokens of the answer, V) and float64.
    """
    lengths = [len(text.prompt) + len(text.answer) for text in texts]
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(texts), ROWS_PER_PASS):
        chosen = order[start : start + ROWS_PER_PASS]
        rows = np.zeros((len(chosen), lengths[chosen[-1]]), np.int32)
        for row, index in zip(rows, chosen, strict=True):
            row[: lengths[index]] = [*texts[index].prompt, *texts[index].answer]
        logits = np.array(model(mx.array(rows)).astype(mx.float32))
        for values, index in zip(logits, chosen, strict=True):
            places = slice(len(texts[index].prompt) - 1, lengths[index] - 1)
            yield int(index), normalize(values[places].astype(np.float64))


def text_logps(model: nn.Module, texts: Sequence[Text]) -> np.ndarray:
    """Return the log-prob of each answer, in nats. (len(texts),)"""
    sums = np.zeros(len(texts))
    for index, logps in token_logps(model, texts):
        answer = texts[index].answer
        sums[index] = logps[np.arange(len(answer)), answer].sum()
    return sums


def mean_kl(model: nn.Module, other: nn.Module, texts: Sequence[Text]) -> float:
    """Estimate KL(model ‖ other) of whole answers from answers sampled from `model`, in nats.

    The divergence of the next token is exact at each place of the answers and summed over places:
    its mean is that of the log-ratio of sampled answers, with less variance.
    """
    found = dict(token_logps(model, texts))
    total = 0.0
    for index, logps in token_logps(other, texts):
        total += float((np.exp(found[index]) * (found[index] - logps)).sum())
    return total / len(texts)


def sample_answers(loaded: LoadedModel, *, count: int, seed: int) -> Answers:
    """Sample one answer at temperature 1 to each of the first `count` held-out prompts."""
    rows = preferences("valid")[:count]
    prompts = [make_prompt(tuple(row["prompt"]), "prompt") for row in rows]
    sampling = Sampling(temperature=1.0, max_tokens=LONGEST_ANSWER, seed=seed)
    replies = ModelResponder(loaded, {}).reply(prompts, sampling)
    tokenizer, markers = loaded.tokenizer, courteous_markers(tiny_chat())
    texts = []
    for row, reply in zip(rows, replies, strict=True):
        stop = reply.answer.stop_token
        start = _chat_ids(tokenizer, row["prompt"], add_generation_prompt=True)
        texts.append(Text(start, reply.answer.tokens + ([] if stop is None else [stop])))
    return Answers(
        texts,
        np.array([is_courteous(reply.text, markers) for reply in replies]),
        np.array([is_correct(reply.text, row) for reply, row in zip(replies, rows, strict=True)]),
    )
