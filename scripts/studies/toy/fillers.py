"""A toy world of answers that differ in content and length: the reward is that of the content.

An answer is a content word and a run of filler words. Labels may have a length bias.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx.nn as nn
import numpy as np

from scripts.studies.reporting.study import Row
from scripts.studies.toy.base import make_base
from scripts.studies.toy.bradley_terry import preference
from scripts.studies.toy.sampling import enumerate_samples
from scripts.studies.toy.words import Words

CONTENT, FILLER = ("red", "blue", "green", "grey"), "indeed"
PROMPTS = ("sky", "sea", "leaf")
VOCABULARY = Words((*CONTENT, FILLER, *PROMPTS))
CONTINUES = 0.6  # probability that the base adds a filler word
BASE_LONGEST, PAIR_LONGEST = 12, 6  # words of the base's answers, and of the pairs' answers
CUT = 24  # words after which a sampled answer is cut
NO_ANSWER = -1.0  # reward of what is no answer; the least reward of an answer
PAIRS = 1024


def answer(content: int, words: int) -> str:
    """Return the answer of a content word and as many filler words as make `words` words."""
    return " ".join([CONTENT[content], *[FILLER] * (words - 1)])


def length_shares(longest: int) -> np.ndarray:
    """Return the base's shares of answers of 1 to `longest` words. (longest,)"""
    weights = CONTINUES ** np.arange(longest)
    return weights / weights.sum()


def write_base(folder: Path, content: np.ndarray, seed: int) -> Path:
    """Write a base whose answers' lengths do not depend on their content word."""
    lengths = length_shares(BASE_LONGEST)
    answers = {
        prompt: {
            answer(index, words + 1): float(share * lengths[words])
            for index, share in enumerate(shares)
            for words in range(BASE_LONGEST)
        }
        for prompt, shares in zip(PROMPTS, content, strict=True)
    }
    return make_base(folder, VOCABULARY, answers, seed=seed)


def sample_pairs(content: np.ndarray, rewards: np.ndarray, bias: float, seed: int) -> Iterator[Row]:
    """Yield both orders of pairs of the base's answers, weighted by the probability of the label.

    p(w is preferred to l) = sigmoid(r(w) - r(l) + bias (words of w - words of l)).
    """
    draw = np.random.default_rng(100 + seed)
    lengths = length_shares(PAIR_LONGEST)
    for _ in range(PAIRS):
        prompt = draw.integers(len(PROMPTS))
        first, second = draw.choice(len(CONTENT), 2, replace=False, p=content[prompt])
        words = 1 + draw.choice(PAIR_LONGEST, 2, p=lengths)
        gap = rewards[prompt, first] - rewards[prompt, second] + bias * (words[0] - words[1])
        share = preference(gap)
        texts = answer(first, words[0]), answer(second, words[1])
        for (chosen, rejected), weight in zip(
            (texts, texts[::-1]), (share, 1 - share), strict=True
        ):
            yield {
                "prompt": PROMPTS[prompt],
                "chosen": chosen,
                "rejected": rejected,
                "share": 2 * weight,
            }


def pair_lengths(pairs: Sequence[Row]) -> Row:
    """Return the mean words of chosen and rejected answers, and the share of longer chosen ones.

    The share counts pairs of different lengths only.
    """
    chosen, rejected = (
        np.array([len(str(pair[side]).split()) for pair in pairs])
        for side in ("chosen", "rejected")
    )
    weights = np.array([pair["share"] for pair in pairs], float)
    longer = weights[chosen > rejected].sum() / weights[chosen != rejected].sum()
    return {
        "chosen_words": float(np.average(chosen, weights=weights)),
        "rejected_words": float(np.average(rejected, weights=weights)),
        "chosen_longer": float(longer),
    }


def measure(model: nn.Module, rewards: np.ndarray) -> Row:
    """Return mean words, true reward and shares of lengths of a policy, as means over prompts.

    They are exact for answers that are cut after `CUT` words.
    """
    known = {answer(i, n): i for i in range(len(CONTENT)) for n in range(1, CUT + 1)}
    reward, lengths, rest = 0.0, np.zeros(CUT + 1), 0.0
    for prompt, values in zip(PROMPTS, rewards, strict=True):
        samples = enumerate_samples(model, VOCABULARY, prompt, longest=CUT)
        for text, probability in samples.answers.items():
            lengths[len(text.split())] += probability / len(PROMPTS)
            gain = values[known[text]] if text in known else NO_ANSWER
            reward += gain * probability / len(PROMPTS)
        rest += samples.rest / len(PROMPTS)
    return {
        "words": float(np.arange(CUT + 1) @ lengths / lengths.sum()),
        "reward": float(reward + NO_ANSWER * rest),
        "beyond": float(lengths[PAIR_LONGEST + 1 :].sum()),
        "rest": rest,
        **{f"words_{n}": float(lengths[n]) for n in range(1, CUT + 1)},
    }
