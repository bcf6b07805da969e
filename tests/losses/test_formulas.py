"""Every loss against its formula in NumPy's float64, and its gradients against closed forms.

The formulas are written from the papers, independently of `mlx_dpo.losses`; the closed forms are
checked against finite differences of the formulas first.
"""

# ruff: noqa: E741  (w and l, as papers have it)

import math

import mlx_dpo  # noqa: F401  (first: it loads OpenBLAS before MLX is imported)

import mlx.core as mx  # isort: skip
import numpy as np
import pytest

from mlx_dpo.config.loss import LossSettings
from mlx_dpo.data.batches.metadata import pair_metadata
from mlx_dpo.losses.catalogue import LOSSES
from mlx_dpo.losses.log_ratios import log_ratios
from mlx_dpo.training.objective import Objective
from mlx_dpo.types import PairLogps, ScoredPairs, TokenizedPair

TOLERANCE = 1e-6
B = 7
BETA, EPS, M = 0.3, 0.2, np.array([0.0, 0.5, 1.5, 0.1, 2.0, 0.0, 0.7])
GOOD = np.array([True, False, True, True, False, False, True])
N_W, N_L = np.array([4, 1, 9, 3, 6, 2, 5]), np.array([2, 7, 3, 3, 1, 8, 5])

draw = np.random.default_rng(11)
REFERENCE = -draw.uniform(2, 20, (2, B))
POLICY = np.minimum(REFERENCE + draw.normal(0, 4, (2, B)), -0.05)
POLICY[:, 0] = REFERENCE[:, 0]  # as before the first step


def s(x):
    return 1 / (1 + np.exp(-x))


def ls(x):
    return -np.logaddexp(0, -x)


# --- formulas: (pw, pl) -> loss, and the slopes towards both --------------------------------


def of_margin(value, slope, *, average=False):
    """A loss of how far chosen is ahead in log-ratios."""
    a, b = (1 / N_W, 1 / N_L) if average else (np.ones(B), np.ones(B))

    def formula(pw, pl):
        margin = (pw - REFERENCE[0]) * a - (pl - REFERENCE[1]) * b
        return value(margin), slope(margin) * a, -slope(margin) * b

    return formula


def of_both(value, slopes):
    """A loss of both log-ratios."""

    def formula(pw, pl):
        ratios = pw - REFERENCE[0], pl - REFERENCE[1]
        return value(*ratios), *slopes(*ratios)

    return formula


def logistic(eps=0.0, m=0.0, beta=BETA):
    return (
        lambda d: -(1 - eps) * ls(beta * d - m) - eps * ls(m - beta * d),
        lambda d: beta * (s(beta * d - m) - (1 - eps)),
    )


def robust(d):
    return (-(1 - EPS) * ls(BETA * d - M) + EPS * ls(M - BETA * d)) / (1 - 2 * EPS)


def robust_slope(d):
    x = BETA * d - M
    return -BETA * ((1 - EPS) * s(-x) + EPS * s(x)) / (1 - 2 * EPS)


def exo(d):
    q = s(BETA * d)
    return q * np.log(q / (1 - EPS)) + (1 - q) * np.log((1 - q) / EPS)


def exo_slope(d):
    q = s(BETA * d)
    return BETA * q * (1 - q) * (BETA * d + math.log(EPS / (1 - EPS)))


TAU = 0.2


def discopop(d):
    x = BETA * d
    return (1 - s(x / TAU)) * -ls(x) + s(x / TAU) * np.exp(-x)


def discopop_slope(d):
    x = BETA * d
    mu = s(x / TAU)
    mixing = mu * (1 - mu) / TAU * (np.exp(-x) + ls(x))
    return BETA * (mixing - (1 - mu) * s(-x) - mu * np.exp(-x))


def aot(pw, pl):
    """The k-th margin of the policy against the k-th of the reference."""
    policy, below = pw - pl, np.sort(REFERENCE[0] - REFERENCE[1])
    value, slope = logistic(EPS)
    delta = np.empty(B)
    for rank, pair in enumerate(sorted(range(B), key=lambda i: policy[i])):
        delta[pair] = policy[pair] - below[rank]
    return value(delta), slope(delta), -slope(delta)


def aot_unpaired(pw, pl):
    rw, rl = pw - REFERENCE[0], pl - REFERENCE[1]
    high, low = (sorted(range(B), key=lambda i, r=r: r[i]) for r in (rw, rl))
    value, slope = logistic(EPS)
    losses, dw, dl = np.empty(B), np.empty(B), np.empty(B)
    for i, j in zip(high, low, strict=True):
        losses[i] = value(rw[i] - rl[j])
        dw[i], dl[j] = slope(rw[i] - rl[j]), -slope(rw[i] - rl[j])
    return losses, dw, dl


LAMBDA = 3.0


def dpop(pw, pl):
    rw, rl = pw - REFERENCE[0], pl - REFERENCE[1]
    x = BETA * (rw - rl - LAMBDA * np.maximum(0, -rw)) - M
    pull = -BETA * s(-x)
    return -ls(x), pull * (1 + LAMBDA * (rw < 0)), -pull


def sft(pw, pl):
    return -pw / N_W.mean(), np.full(B, -1 / N_W.mean()), np.zeros(B)


GAMMA = 0.8


def simpo(pw, pl):
    value, slope = logistic(EPS, GAMMA + M)
    d = pw / N_W - pl / N_L
    return value(d), slope(d) / N_W, -slope(d) / N_L


ALPHA = 0.7


def cpo(pw, pl):
    value, slope = logistic(EPS, M)
    nll = -pw / N_W.mean()
    return value(pw - pl) + ALPHA * nll, slope(pw - pl) - ALPHA / N_W.mean(), -slope(pw - pl)


def orpo(pw, pl):
    aw, al = pw / N_W, pl / N_L
    odds = np.log(np.exp(aw) / (1 - np.exp(aw))) - np.log(np.exp(al) / (1 - np.exp(al)))
    pull = -BETA * s(-odds)
    dw = pull / (1 - np.exp(aw)) / N_W - 1 / N_W.mean()
    return -pw / N_W.mean() - BETA * ls(odds), dw, -pull / (1 - np.exp(al)) / N_L


def kto(pw, pl):
    r, z = pw - REFERENCE[0], max(0.0, (POLICY[1] - REFERENCE[1]).mean())
    sign, weight = np.where(GOOD, 1, -1), np.where(GOOD, 1.5, 0.5)
    x = BETA * sign * (r - z)
    return weight * (1 - s(x)), -weight * BETA * sign * s(x) * s(-x), np.zeros(B)


ETA = 1.5


def rpo(d):
    """The KL divergence of two Bernoulli distributions, of the scores and of the policy."""
    p, q = s(ETA * M), s(BETA * d)
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def rpo_slope(d):
    return BETA * (s(BETA * d) - s(ETA * M))


# Plain pairs are lists of two, with scores of 1 and 0 and the policy's ranks 1 and 2, either way.
LIPO_WEIGHT = 1 / math.log(2) - 1 / math.log(3)
ZERO = np.zeros(B)
SMOOTH = {"label_smoothing": EPS}
FORMULAS = {
    "sigmoid": (of_margin(*logistic(m=M)), {}),
    "cdpo": (of_margin(*logistic(EPS, M)), SMOOTH),
    "robust": (of_margin(robust, robust_slope), SMOOTH),
    "hinge": (
        of_margin(lambda d: np.maximum(0, 1 + M - BETA * d), lambda d: -BETA * (BETA * d - M < 1)),
        {},
    ),
    "ipo": (
        of_margin(lambda d: (d - 1 / (2 * BETA)) ** 2, lambda d: 2 * d - 1 / BETA, average=True),
        {},
    ),
    "exo_pair": (of_margin(exo, exo_slope), SMOOTH),
    "discopop": (of_margin(discopop, discopop_slope), {"discopop_tau": TAU}),
    "sigmoid_norm": (of_margin(*logistic(m=M), average=True), {}),
    "nca_pair": (
        of_both(
            lambda w, l: -ls(BETA * w) - ls(-BETA * w) / 2 - ls(-BETA * l) / 2,
            lambda w, l: (BETA * (1.5 * s(BETA * w) - 1), BETA / 2 * s(BETA * l)),
        ),
        {},
    ),
    "bco_pair": (
        of_both(
            lambda w, l: -ls(BETA * w) - ls(-BETA * l),
            lambda w, l: (-BETA * s(-BETA * w), BETA * s(BETA * l)),
        ),
        {},
    ),
    "sppo_hard": (
        of_both(
            lambda w, l: (w - 1 / (2 * BETA)) ** 2 + (l + 1 / (2 * BETA)) ** 2,
            lambda w, l: (2 * w - 1 / BETA, 2 * l + 1 / BETA),
        ),
        {},
    ),
    "apo_zero": (
        of_both(
            lambda w, l: 1 - s(BETA * w) + s(BETA * l),
            lambda w, l: (
                -BETA * s(BETA * w) * s(-BETA * w),
                BETA * s(BETA * l) * s(-BETA * l),
            ),
        ),
        {},
    ),
    "apo_down": (
        of_both(
            lambda w, l: s(BETA * w) + 1 - s(BETA * (w - l)),
            lambda w, l: (
                BETA * s(BETA * w) * s(-BETA * w) - BETA * s(BETA * (w - l)) * s(BETA * (l - w)),
                BETA * s(BETA * (w - l)) * s(BETA * (l - w)),
            ),
        ),
        {},
    ),
    "aot": (aot, SMOOTH),
    "aot_unpaired": (aot_unpaired, SMOOTH),
    "dpop": (dpop, {"dpop_lambda": LAMBDA}),
    "sft": (sft, {}),
    "simpo": (simpo, {"simpo_gamma": GAMMA, **SMOOTH}),
    "cpo": (cpo, {"cpo_alpha": ALPHA, **SMOOTH}),
    "orpo": (orpo, {}),
    "plackett_luce": (of_margin(*logistic()), {}),
    "lipo_lambda": (
        of_margin(*(lambda d, f=f: LIPO_WEIGHT * f(d) for f in logistic())),
        {},
    ),
    "rpo_bwd_kl": (of_margin(rpo, rpo_slope), {"rpo_eta": ETA}),
    "kto": (kto, {"desirable_weight": 1.5, "undesirable_weight": 0.5}),
}
NAMES = sorted(FORMULAS)
KINKS = {"hinge", "dpop"}  # at the pair where the policy is the reference


def test_every_loss_has_a_formula():
    assert FORMULAS.keys() == LOSSES.keys()


@pytest.mark.parametrize("name", NAMES)
def test_closed_forms_are_the_slopes_of_the_formulas(name):
    formula, _ = FORMULAS[name]
    step = 1e-5
    for index in (0, 1):
        for pair in range(name in KINKS, B):
            up, down = POLICY.copy(), POLICY.copy()
            up[index, pair] += step
            down[index, pair] -= step
            change = formula(*up)[0].sum() - formula(*down)[0].sum()
            assert formula(*POLICY)[1 + index][pair] == pytest.approx(
                change / (2 * step), abs=1e-7, rel=1e-7
            )


# --- mlx-dpo ---------------------------------------------------------------------------------


def make_metadata(*, margins=True, weights=None):
    return pair_metadata(
        [
            TokenizedPair(
                (0,), (1,) * int(N_W[i]), (1,) * int(N_L[i]),
                desirable=bool(GOOD[i]),
                margin=float(M[i]) if margins else 0.0,
                weight=1.0 if weights is None else weights[i],
            )
            for i in range(B)
        ]
    )  # fmt: skip


def scored(policy, of=None, reference=REFERENCE, on_policy=None):
    return ScoredPairs(
        PairLogps(*policy),
        PairLogps(*(mx.array(index.astype(np.float32)) for index in reference)),
        make_metadata() if of is None else of,
        mx.ones((B,)) if on_policy is None else mx.array(on_policy),
    )


def value_and_slopes(objective, policy, of=None, reference=REFERENCE, on_policy=None):
    """Losses (B,), and the slope of their sum towards chosen and rejected. (B,) each"""

    def total(w, l):
        pairs = scored((w, l), of, reference, on_policy)
        losses = objective.compute_losses(pairs, log_ratios(pairs.policy, pairs.reference))
        return losses.sum(), losses

    inputs = [mx.array(np.asarray(index, np.float32)) for index in policy]
    (_, losses), (dw, dl) = mx.value_and_grad(total, argnums=(0, 1))(*inputs)
    return np.array(losses), np.array(dw), np.array(dl)


def objective_of(name, **more):
    _, settings = FORMULAS[name]
    return Objective(LossSettings(loss_type=(name,), beta=BETA, **{**settings, **more}))


def assert_near(actual, expected):
    scale = max(1.0, np.abs(expected).max())
    assert np.abs(actual - expected).max() <= TOLERANCE * scale


@pytest.mark.parametrize("name", NAMES)
def test_value_and_slopes_are_those_of_the_formula(name):
    formula, _ = FORMULAS[name]
    for actual, expected in zip(
        value_and_slopes(objective_of(name), POLICY), formula(*POLICY), strict=True
    ):
        assert_near(actual, expected)


@pytest.mark.parametrize("name", sorted(n for n, loss in LOSSES.items() if not loss.uses_margins))
def test_margins_of_the_data_do_not_act_on_the_other_losses(name):
    """`uses_margins` is False for them; FORMULAS have the losses that margins act on."""
    with_them = value_and_slopes(objective_of(name), POLICY)
    without = value_and_slopes(objective_of(name), POLICY, make_metadata(margins=False))
    assert all(np.array_equal(a, b) for a, b in zip(with_them, without, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_pairs_weights_multiply_its_loss(name):
    weights, on_policy = draw.uniform(0.5, 2, B), draw.uniform(0.1, 1, B).astype(np.float32)
    plain, *_ = value_and_slopes(objective_of(name), POLICY)
    weighed, *_ = value_and_slopes(
        objective_of(name), POLICY, make_metadata(weights=weights), on_policy=on_policy
    )
    assert_near(weighed, plain * weights * on_policy)


def test_a_sum_is_the_weighted_sum_of_its_losses():
    names, weights = ("hinge", "sft", "nca_pair"), (0.5, 2.0, 0.25)
    total = Objective(LossSettings(loss_type=names, loss_weights=weights, beta=BETA))
    parts = [value_and_slopes(objective_of(name), POLICY) for name in names]
    for i, actual in enumerate(value_and_slopes(total, POLICY)):
        parts_of_it = (w * part[i] for w, part in zip(weights, parts, strict=True))
        assert_near(actual, sum(parts_of_it))


@pytest.mark.parametrize(
    "name", sorted(n for n, loss in LOSSES.items() if not loss.uses_whole_batch)
)
def test_a_pairs_loss_depends_on_no_other_pair(name):
    """`sft` is divided by a mean over the step, which is a fact, not a pass."""
    objective, of = objective_of(name), make_metadata()
    whole, *_ = value_and_slopes(objective, POLICY, of)
    other = POLICY.copy()
    other[:, 1:] *= 1.5
    moved, *_ = value_and_slopes(objective, other, of)
    assert moved[0] == whole[0]
    assert not np.array_equal(moved[1:], whole[1:])


@pytest.mark.parametrize("name", NAMES)
def test_reordering_the_pairs_reorders_their_losses(name):
    """Also where they are coupled: each term belongs to the pair whose value stands in it."""
    order = draw.permutation(B)
    objective, of = objective_of(name), make_metadata()
    moved_metadata = type(of)(*(v[mx.array(order)] if v.ndim else v for v in of))
    for actual, before in zip(
        value_and_slopes(objective, POLICY[:, order], moved_metadata, REFERENCE[:, order]),
        value_and_slopes(objective, POLICY, of),
        strict=True,
    ):
        assert_near(actual, before[order])


# --- symmetries -----------------------------------------------------------------------------

EVEN = pair_metadata([TokenizedPair((0,), (1,) * 3, (1,) * 3)] * B)  # no margins, lengths alike


def swapped(name, **more):
    """Losses as they are, and with chosen and rejected changed over."""
    objective = objective_of(name, **more)
    straight, *_ = value_and_slopes(objective, POLICY, EVEN)
    other, *_ = value_and_slopes(objective, POLICY[::-1], EVEN, REFERENCE[::-1])
    return straight, other, np.diff(POLICY - REFERENCE, axis=0)[0] * -1


def test_swapping_a_pair_adds_the_margin_to_the_logistic_losses():
    """-log σ(-x) = x - log σ(x)."""
    for name, more in (("sigmoid", {}), ("aot", {"label_smoothing": 0.0})):
        straight, other, margin = swapped(name, **more)
        total = BETA * margin.sum()
        assert (other - straight).sum() == pytest.approx(total, abs=2e-5), name
    straight, other, margin = swapped("cdpo")
    assert_near(other - straight, (1 - 2 * EPS) * BETA * margin)


def test_the_mean_of_the_robust_loss_over_flipped_labels_is_dpo():
    straight, other, _ = swapped("robust")
    clean, *_ = swapped("sigmoid")
    assert_near((1 - EPS) * straight + EPS * other, clean)


def test_swapping_a_pair_adds_twice_the_margin_over_beta_to_ipo():
    """(x + c)² - (x - c)² = 4 x c, with c = 1 / (2 beta) and averages over three tokens."""
    straight, other, margin = swapped("ipo")
    assert_near(other - straight, 2 * margin / 3 / BETA)


def test_swapping_a_pair_mirrors_hinge_and_apo_zero():
    straight, other, margin = swapped("hinge")
    inside = np.abs(BETA * margin) < 1
    assert_near((straight + other)[inside], np.full(inside.sum(), 2.0))
    straight, other, _ = swapped("apo_zero")
    assert_near(straight + other, np.full(B, 2.0))


def test_swapping_a_pair_adds_both_log_ratios_to_bco_and_sppo():
    ratios = POLICY - REFERENCE
    straight, other, margin = swapped("bco_pair")
    assert_near(other - straight, BETA * margin)
    straight, other, margin = swapped("sppo_hard")
    assert_near(other - straight, 2 * (ratios[0] - ratios[1]) / BETA)


def test_exo_is_the_kl_divergence_of_two_bernoulli_distributions():
    """It vanishes where the policy prefers as the labels do, and is positive elsewhere."""
    best = math.log((1 - EPS) / EPS) / BETA
    policy = REFERENCE + np.stack([np.linspace(best - 4, best + 4, B), ZERO])
    losses, dw, _ = value_and_slopes(objective_of("exo_pair"), policy, EVEN)
    assert losses[B // 2] == pytest.approx(0, abs=1e-6)
    assert dw[B // 2] == pytest.approx(0, abs=1e-6)
    assert (np.delete(losses, B // 2) > 1e-4).all()


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_optimal_transport_is_independent_of_the_pairing(name):
    """`aot_unpaired` compares two heaps; `aot` those of policy's and reference's margins."""
    objective, order = objective_of(name), np.roll(np.arange(B), 3)
    before, *_ = value_and_slopes(objective, POLICY, EVEN)
    if name == "aot":  # the reference's margins come to other pairs
        after, *_ = value_and_slopes(objective, POLICY, EVEN, REFERENCE[:, order])
    else:  # rejected completions do
        policy, reference = (np.stack([x[0], x[1][order]]) for x in (POLICY, REFERENCE))
        after, *_ = value_and_slopes(objective, policy, EVEN, reference)
    assert after.sum() == pytest.approx(before.sum(), rel=1e-6)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_optimal_transport_of_a_single_pair_is_dpo(name):
    metadata = pair_metadata([TokenizedPair((0,), (1,), (1,))])

    def compute(loss_type):
        logps = [PairLogps(*(mx.array(s[2:3].astype(np.float32)) for s in x))
                 for x in (POLICY, REFERENCE)]  # fmt: skip
        pairs = ScoredPairs(*logps, metadata=metadata, on_policy_weights=mx.ones((1,)))
        return (
            Objective(LossSettings(loss_type=(loss_type,)))
            .compute_losses(pairs, log_ratios(*logps))
            .item()
        )

    assert compute(name) == pytest.approx(compute("sigmoid"), rel=1e-6)


# --- far out --------------------------------------------------------------------------------

FAR = [np.array([w, l]) for w in (-2000.0, 0.0, 2000.0) for l in (-2000.0, 0.0, 2000.0)]


@pytest.mark.parametrize(
    ("name", "divergence"),
    [
        (name, divergence)
        for name in NAMES
        for divergence in (None, "forward_kl", "js_divergence", "alpha_divergence")
        if divergence is None or LOSSES[name].uses_divergence
    ],
)
def test_values_and_gradients_are_finite_at_two_thousand_nats(name, divergence):
    loss = LOSSES[name]
    for beta in (None, 5.0):
        objective = Objective(
            LossSettings(loss_type=(name,), beta=beta, f_divergence_type=divergence)
        )
        for far in FAR:
            policy = np.repeat(np.minimum(far, 0)[:, None], B, axis=1)
            reference = np.repeat(np.minimum(-far, 0)[:, None], B, axis=1)
            if not loss.needs_reference:
                reference = np.zeros((2, B))
            actual = value_and_slopes(objective, policy, None, reference)
            assert all(np.isfinite(part).all() for part in actual), (far, beta)


@pytest.mark.parametrize("divergence", ["forward_kl", "alpha_divergence"])
def test_a_very_unlikely_completion_still_gets_a_gradient(divergence):
    """A cut exponential would leave chosen without a slope just where it fell most."""
    policy = REFERENCE + np.array([[-500.0], [0.0]])
    objective = Objective(LossSettings(loss_type=("sigmoid",), f_divergence_type=divergence))
    _, dw, _ = value_and_slopes(objective, policy, EVEN)
    assert (dw < -1).all()


def test_the_odds_of_a_certain_completion_are_finite():
    """At a log-probability of 0 they are infinite; here they end at a token in a million."""
    objective = Objective(LossSettings(loss_type=("orpo",)))
    losses, dw, dl = value_and_slopes(objective, np.zeros((2, B)), EVEN, np.zeros((2, B)))
    assert losses == pytest.approx(np.full(B, 0.1 * math.log(2)))
    assert (dl == 0).all() and dw == pytest.approx(np.full(B, -1 / 3))


def test_dpop_has_the_gradient_of_dpo_if_the_policy_is_the_reference():
    """The penalty has a kink just there, at the first step of every run."""
    at = value_and_slopes(Objective(LossSettings(loss_type=("dpop",))), REFERENCE, EVEN)
    of_dpo = value_and_slopes(Objective(LossSettings(loss_type=("sigmoid",))), REFERENCE, EVEN)
    assert all(np.array_equal(a, b) for a, b in zip(at, of_dpo, strict=True))
