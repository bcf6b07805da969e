"""Losses that are compared under label noise, with the exact minimum of each, and measurements."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from scripts.studies.reporting.study import Row
from scripts.studies.toy import bradley_terry as bt
from scripts.studies.toy.exact import kl_divergence, optimal_policy

BETA = 0.5
TOKENS = 3  # of an answer in the world of words, its end included

# Columns that a form of the data does not have.
ERROR: Row = {"error": np.nan, "predicted_error": np.nan}
ACCURACY: Row = {"clean_accuracy": np.nan, "shown_accuracy": np.nan}


@dataclass(frozen=True)
class Method:
    """A loss, its settings for a share of flipped labels, and the minimum of its expectation.

    Attributes:
        settings: settings of the trainer, from the assumed share of flipped labels.
        scores: log-ratios of π to π_ref up to a constant at the minimum of the expected loss, from
            the shares of labels (answers, answers), the assumed rate and β. (answers,)
    """

    settings: Callable[[float], Row]
    scores: Callable[[np.ndarray, float], np.ndarray]


# The product averages IPO's margins per token. With this τ, IPO and DPO have the same minimum for
# answers of three tokens and rewards that hardly differ.
IPO_BETA = BETA * TOKENS / 4
METHODS = {
    "dpo": Method(
        lambda rate: {"loss_type": "sigmoid", "beta": BETA},
        lambda shares, rate: bt.logistic_scores(shares) / BETA,
    ),
    "dpo_scaled": Method(
        lambda rate: {"loss_type": "sigmoid", "beta": BETA * (1 - 2 * rate)},
        lambda shares, rate: bt.logistic_scores(shares) / (BETA * (1 - 2 * rate)),
    ),
    "cdpo": Method(
        lambda rate: {"loss_type": "cdpo", "beta": BETA, "label_smoothing": rate},
        lambda shares, rate: bt.logistic_scores(bt.flip(shares, rate)) / BETA,
    ),
    "rdpo": Method(
        lambda rate: {"loss_type": "robust", "beta": BETA, "label_smoothing": rate},
        lambda shares, rate: bt.logistic_scores(bt.unflip(shares, rate)) / BETA,
    ),
    "ipo": Method(
        lambda rate: {"loss_type": "ipo", "beta": IPO_BETA},
        lambda shares, rate: bt.squared_scores((2 * shares - 1) * TOKENS / (2 * IPO_BETA)),
    ),
}


def returns(logps: np.ndarray, reference: np.ndarray, rewards: np.ndarray) -> Row:
    """Return expected reward, KL and regret of a policy, as means over prompts; all are exact.

    The objective is expected reward minus β KL(π ‖ π_ref); the regret is that of π* minus that of
    the policy.
    """
    best = optimal_policy(reference, rewards, BETA)
    reward, base, optimal = (
        float((np.exp(values) * rewards).sum(axis=-1).mean()) for values in (logps, reference, best)
    )
    divergence, least = (float(kl_divergence(v, reference).mean()) for v in (logps, best))
    return {
        "reward": reward,
        "kl": divergence,
        "regret": (optimal - BETA * least) - (reward - BETA * divergence),
        "base_reward": base,
        "optimal_reward": optimal,
    }


def root_mean_square(values: np.ndarray | Sequence[np.ndarray]) -> float:
    """Return the root of the mean square of all values."""
    return float(np.sqrt(np.mean(np.square(values))))
