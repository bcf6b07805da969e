"""Bradley-Terry labels of all pairs of answers, and the minima of losses on these pairs."""

from collections.abc import Iterator, Sequence
from itertools import permutations

import numpy as np

from scripts.studies.reporting.study import Row

NEWTON_STEPS = 50


def preference(margin: float) -> float:
    """Return the Bradley-Terry probability of an answer whose reward is higher by `margin`."""
    return float(1 / (1 + np.exp(-margin)))


def preferences(rewards: np.ndarray) -> np.ndarray:
    """Return the Bradley-Terry probability that answer i is preferred to j. (..., n, n)

    Args:
        rewards: rewards of the answers. (..., n)
    """
    return 1 / (1 + np.exp(rewards[..., None, :] - rewards[..., :, None]))


def weighted_pairs(
    prompts: Sequence[str], answers: Sequence[str], shares: np.ndarray
) -> Iterator[Row]:
    """Yield every ordered pair of answers as a row, weighted by its `share` of the labels.

    The mean loss of these rows is the expected loss of sampled labels.

    Args:
        shares: share of the labels that prefer answer i to j. (prompts, n, n)
    """
    for prompt, values in zip(prompts, shares, strict=True):
        for chosen, rejected in permutations(range(len(answers)), 2):
            yield {
                "prompt": prompt,
                "chosen": answers[chosen],
                "rejected": answers[rejected],
                "share": float(values[chosen, rejected]),
            }


def flip(shares: np.ndarray, rate: float) -> np.ndarray:
    """Return the shares of labels after each label is flipped with probability `rate`."""
    return (1 - rate) * shares + rate * (1 - shares)


def unflip(shares: np.ndarray, rate: float) -> np.ndarray:
    """Return the shares of labels before the flips: the inverse of `flip`.

    The robust loss has the same gradient as the logistic loss with these shares. They may be
    below 0 or above 1. Source: Ray Chowdhury et al. 2024, arXiv:2403.00409, Section 3.
    """
    return (shares - rate) / (1 - 2 * rate)


def logistic_scores(shares: np.ndarray) -> np.ndarray:
    """Return the scores, of mean 0, with the least logistic loss for shares of preference. (n,)

    They minimise -Σ shares[i, j] log sigmoid(score[i] - score[j]) over all ordered pairs, by
    Newton's method, where shares[i, j] + shares[j, i] = 1.
    """
    others = 1 - np.eye(len(shares))
    scores = np.zeros(len(shares))
    for _ in range(NEWTON_STEPS):
        found = preferences(scores)
        slope = ((found - shares) * others).sum(axis=1)
        # The Laplacian is singular for constants; 1/n makes it regular and keeps the mean.
        scores -= np.linalg.solve(_laplacian(found * (1 - found)) + 1 / len(shares), slope)
    return scores


def squared_scores(margins: np.ndarray) -> np.ndarray:
    """Return the scores, of mean 0, whose differences have the least squared error. (n, n) -> (n,)

    `margins` is antisymmetric, with the margin of row i over column j.
    """
    return margins.mean(axis=1)


def score_errors(rewards: np.ndarray, rate: float, labels: int) -> np.ndarray:
    """Return the standard errors of the scores that minimise the robust loss. (n,)

    First order in 1 / labels: inverse curvature of the clean loss, on both sides of the variance of
    the gradient, which is that of flipped labels over (1 - 2 rate)².

    Args:
        rate: share of flipped labels, known to the loss.
        labels: labels of each unordered pair.
    """
    clean = preferences(rewards)
    noisy = flip(clean, rate)
    curvature = np.linalg.pinv(_laplacian(clean * (1 - clean)))
    noise = _laplacian(noisy * (1 - noisy) / (labels * (1 - 2 * rate) ** 2))
    return np.sqrt(np.diag(curvature @ noise @ curvature))


def _laplacian(weights: np.ndarray) -> np.ndarray:
    off = weights * (1 - np.eye(len(weights)))
    return np.diag(off.sum(axis=1)) - off
