"""Losses of pairs, with their settings and the closed forms of their minima."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from scripts.studies.toy import population
from scripts.studies.toy.bradley_terry import flip
from scripts.studies.toy.population import logit

NOISE, GAMMA = 0.1, 0.5
MARGIN, PER_TOKEN, LOGP_PER_TOKEN = "βΔ", "βΔ per token", "β × margin of log-probs per token"
REWARDS = "βr"


class PairLoss(NamedTuple):
    """A loss of pairs with its settings, what is measured, and the closed form of it."""

    name: str
    settings: Mapping[str, Any]
    quantity: str
    optimum: Callable[[np.ndarray], np.ndarray]  # of the probability that a is preferred
    formula: str
    flipped: float = 0.0  # share of labels that are flipped
    quick: bool = False

    @property
    def beta(self) -> float:
        """β of the loss."""
        return float(self.settings["beta"])


def settings(loss: str, beta: float, **more: float) -> dict[str, Any]:
    """Return the settings of a loss."""
    return {"loss_type": loss, "beta": beta, **more}


PAIR_LOSSES = (
    PairLoss("DPO", settings("sigmoid", 1.0), MARGIN, logit, "L(p)", quick=True),
    PairLoss(
        "conservative DPO",
        settings("sigmoid", 0.5, label_smoothing=NOISE),
        MARGIN,
        lambda p: logit(flip(p, NOISE)),
        "L((1 − ε) p + ε (1 − p))",
        quick=True,
    ),
    PairLoss(
        "DPO, flipped labels",
        settings("sigmoid", 0.5),
        MARGIN,
        lambda p: logit(flip(p, NOISE)),
        "L((1 − ε) p + ε (1 − p))",
        flipped=NOISE,
    ),
    PairLoss(
        "robust DPO, flipped labels",
        settings("robust", 0.5, label_smoothing=NOISE),
        MARGIN,
        logit,
        "L(p)",
        flipped=NOISE,
        quick=True,
    ),
    PairLoss("IPO", settings("ipo", 0.5), PER_TOKEN, lambda p: p - 0.5, "p − ½", quick=True),
    PairLoss("DPO per token", settings("sigmoid_norm", 2.0), PER_TOKEN, logit, "L(p)"),
    PairLoss("hinge", settings("hinge", 0.5), MARGIN, np.ones_like, "1"),
    PairLoss(
        "EXO",
        settings("exo_pair", 0.5, label_smoothing=NOISE),
        MARGIN,
        lambda p: population.exo_margin(p, NOISE),
        "(2p − 1) L(1 − ε)",
    ),
    PairLoss(
        "SimPO",
        settings("simpo", 2.0, simpo_gamma=GAMMA),
        LOGP_PER_TOKEN,
        lambda p: population.simpo_margin(p, GAMMA),
        "log t, (1 − p) t² + (1 − 2p) e^γ t = p",
    ),
    PairLoss("BCO", settings("bco_pair", 2.0), REWARDS, logit, "L(q)"),
    PairLoss("NCA", settings("nca_pair", 1.0), REWARDS, lambda q: np.log(2 * q), "log(2q)"),
    PairLoss("SPPO", settings("sppo_hard", 0.5), REWARDS, lambda q: q - 0.5, "q − ½"),
)
