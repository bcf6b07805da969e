"""The exact distribution of the best of N samples."""

import numpy as np

SMALLEST = 1e-300  # probability, so that logs are finite


def best_of(logps: np.ndarray, rewards: np.ndarray, count: int) -> np.ndarray:
    """Return the log-probs of the answer with the highest reward of `count` samples.

        p_N(y) = p(y) / p(r = r(y)) · [P(r ≤ r(y))^N - P(r < r(y))^N]

    The first one of equally good samples is taken, so that answers of one reward keep their
    proportions.

    It is the distribution of the largest of N draws, for which Stiennon et al. 2020,
    arXiv:2009.01325, appendix G.3, have the KL divergence.

    Args:
        logps: log-probs of all answers, in nats. (..., answers)
        rewards: their rewards, of the same shape or of the last axis.
    """
    logps, rewards = np.broadcast_arrays(logps, rewards)
    rows = zip(
        logps.reshape(-1, logps.shape[-1]), rewards.reshape(-1, logps.shape[-1]), strict=True
    )
    return np.stack([_best_of(*row, count) for row in rows]).reshape(logps.shape)


def _best_of(logps: np.ndarray, rewards: np.ndarray, count: int) -> np.ndarray:
    _, level = np.unique(rewards, return_inverse=True)
    mass = np.bincount(level, np.exp(logps))
    up_to = np.minimum(np.cumsum(mass) / mass.sum(), 1.0)
    below = np.append(0.0, up_to[:-1])
    chance = np.maximum(up_to**count - below**count, SMALLEST)
    return logps + np.log(chance[level]) - np.log(np.maximum(mass, SMALLEST)[level])


def kl_bound(count: int) -> float:
    """Return log N - (N - 1) / N, the KL divergence of the best of N; with ties it is less.

    Source: Stiennon et al. 2020, arXiv:2009.01325, appendix G.3; that it is a bound with ties:
    Beirami et al. 2024, arXiv:2401.01879.
    """
    return float(np.log(count) - (count - 1) / count)
