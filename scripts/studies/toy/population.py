"""Minima of expected preference losses in closed form, in float64.

Two answers a and b of one prompt are compared many times; a is preferred with probability p. The
expected loss of a pairwise loss l is then p l(a, b) + (1 - p) l(b, a). A policy that can give any
probability to any answer minimizes it at the values below: r(y) = log π(y) - log π_ref(y) is the
log-ratio, Δ = r(a) - r(b) the margin, |y| the number of tokens, L(q) = log(q / (1 - q)).

DPO, also with smoothed or flipped labels: p is replaced by the share of the labels that the loss
counts as a's, and -q log σ(x) - (1 - q) log σ(-x) has its minimum at x = L(q).

IPO: p (h - c)² + (1 - p) (h + c)² with c = 1 / (2β) has its minimum at h = (2p - 1) c, where h is
the margin of the log-ratios per token. SPPO: the same for each log-ratio by itself.

Hinge: p max(0, 1 - x) + (1 - p) max(0, 1 + x) is linear between -1 and 1 and falls there with
slope 1 - 2p; beyond 1 it rises. For p > 1/2 the minimum is at x = 1.

EXO: with s = σ(x) the expected loss is s log s + (1 - s) log(1 - s) minus
(2p - 1) s (log(1 - ε) - log ε), up to a constant. It is convex in s; its derivative
L(s) - (2p - 1) L(1 - ε) vanishes at x = (2p - 1) L(1 - ε).

SimPO: with x = β times the margin of log-probs per token, the expected loss is
-p log σ(x - γ) - (1 - p) log σ(-x - γ). Its derivative vanishes where
p σ(γ - x) = (1 - p) σ(γ + x), or (1 - p) t² + (1 - 2p) e^γ t - p = 0 for t = exp(x).

BCO and NCA are sums of functions of one log-ratio. Let q be the probability that the answer is
the preferred one of its pair. BCO: -q log σ(x) - (1 - q) log σ(-x) has its minimum at x = L(q).
NCA: -q log σ(x) - ½ log σ(-x) has its minimum at σ(x) = q / (q + ½), or x = log(2q).

KTO: an answer that is labelled desirable with probability q has the expected loss
λ_D q + ((1 - q) λ_U - q λ_D) σ(β (r - z)). It is monotone in r, so that no finite r is best: r goes
up if q > λ_U / (λ_D + λ_U) and down if q is less.
"""

import numpy as np

Array = np.ndarray


def logit(probability: Array) -> Array:
    """Return log(p / (1 - p))."""
    return np.log(probability) - np.log1p(-probability)


def exo_margin(probability: Array, smoothing: float) -> Array:
    """Return βΔ at the minimum of the expected EXO loss."""
    return (2 * probability - 1) * logit(np.array(1 - smoothing))


def simpo_margin(probability: Array, gamma: float) -> Array:
    """Return β times the margin of log-probs per token at the minimum of the SimPO loss."""
    a, b, c = 1 - probability, (1 - 2 * probability) * np.exp(gamma), -probability
    return np.log((-b + np.sqrt(b * b - 4 * a * c)) / (2 * a))


def ipo_scores(preferences: Array) -> Array:
    """Return β r(y) / |y| of each answer at the minimum of the expected IPO loss, with mean 0.

    All ordered pairs of K answers occur equally often, and their labels follow any preferences:

        β r(y) / |y| = mean over y' of p(y ≻ y') - 1/2, with p(y ≻ y) = 1/2

    The derivative of the sum of p_ij (m_i - m_j - c)², c = 1 / (2β), by m_i vanishes where
    K m_i - sum of m_j = c times the sum over j of (2 p_ij - 1).

    Args:
        preferences: p_ij, the probability that answer i is preferred to j. (..., K, K)

    Source: Azar et al. 2023, arXiv:2310.12036, Eqs. 9 and 12, for uniform μ; they have sums of
    log-probs where the package has means over tokens.
    """
    return preferences.mean(axis=-1) - 0.5


def ipo_policy(pairs: Array, reference: Array, target: float) -> Array:
    """Return the log-probs of the policy that minimizes IPO's loss on a list of pairs. (K,)

    The log-ratios are the least-squares solution of r(w) - r(l) = target for all pairs, and the
    policy is normalized over the K answers.

    Args:
        pairs: indices of chosen and rejected. (N, 2)
        reference: log-probs of the reference. (K,)
        target: 1 / (2τ).

    Source: Azar et al. 2023, arXiv:2310.12036, Eq. 17.
    """
    differences = np.zeros((len(pairs), len(reference)))
    differences[np.arange(len(pairs)), pairs[:, 0]] = 1
    differences[np.arange(len(pairs)), pairs[:, 1]] = -1
    ratios = np.linalg.lstsq(differences, np.full(len(pairs), target), rcond=None)[0]
    logps = reference + ratios
    return logps - np.log(np.exp(logps).sum())


def divergence_scores(name: str, ratios: Array) -> Array:
    """Return f'(π / π_ref) of each log-ratio, for the f-divergence of this name.

    At the minimum of DPO's expected loss with an f-divergence, β f'(u) is the known reward up to a
    constant per prompt. Generators f(u): u log u (reverse KL), -log u (forward KL),
    u log u - (u + 1) log((u + 1) / 2) (Jensen-Shannon), and the α-divergence of α = 1/2,
    whose f'(u) is 2 (1 - u^(-1/2)).

    Source: Wang et al. 2023, arXiv:2309.16240, Table 1 and Theorem 1.
    """
    u = np.exp(ratios)
    scores = {
        "forward_kl": -1 / u,
        "js_divergence": np.log(2 * u / (1 + u)),
        "alpha_divergence": 2 * (1 - u**-0.5),
    }
    return scores[name]


def kto_threshold(desirable_weight: float, undesirable_weight: float) -> float:
    """Return the probability of `desirable` above which KTO makes an answer more likely."""
    return undesirable_weight / (desirable_weight + undesirable_weight)
