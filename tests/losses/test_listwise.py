"""Losses of ranked lists against their equations in float64, written for lists, not for pairs."""

import itertools
from dataclasses import replace

import mlx_dpo  # noqa: F401  (first: it loads OpenBLAS before MLX is imported)

import mlx.core as mx  # isort: skip
import numpy as np
import pytest

from mlx_dpo.config.loss import LossSettings
from mlx_dpo.data.batches.metadata import pair_metadata
from mlx_dpo.losses.listwise import TIE
from mlx_dpo.losses.log_ratios import log_ratios
from mlx_dpo.losses.metrics import compute_metrics
from mlx_dpo.training.grad_cache import GradCache
from mlx_dpo.training.objective import Objective
from mlx_dpo.types import PairLogps, RankedPair, ScoredPairs, TokenizedPair

BETA = 0.3
NAMES = ("plackett_luce", "lipo_lambda")
# Scores of the completions of each list; the second has ties, the last two completions.
SCORES = ([1.0, 3.5, 2.0, 0.5], [2.0, 0.0, 2.0, 1.0, 1.0], [0.2, 0.9], [-3.0, -1.0, -2.0])
RATIOS = tuple(np.random.default_rng(5).normal(0, 3, len(scores)) for scores in SCORES)


def s(x):
    return 1 / (1 + np.exp(-x))


def plackett_luce(ratios, scores):
    """Loss of a list, and its slopes towards the log-ratios."""
    loss, slopes = 0.0, np.zeros(len(ratios))
    for i in range(len(ratios)):
        worse = [j for j in range(len(ratios)) if scores[j] < scores[i]]
        draw = np.exp(BETA * ratios[[i, *worse]])
        loss -= np.log(draw[0] / draw.sum())
        slopes[[i, *worse]] += BETA * draw / draw.sum()
        slopes[i] -= BETA
    return loss, slopes


def lipo_lambda(ratios, scores):
    """Ranks by sorting; only for log-ratios without ties."""
    order = sorted(range(len(ratios)), key=lambda i: -ratios[i])
    discount = {i: 1 / np.log(1 + rank) for rank, i in enumerate(order, start=1)}
    loss, slopes = 0.0, np.zeros(len(ratios))
    for i, j in itertools.permutations(range(len(ratios)), 2):
        if scores[i] > scores[j]:
            gain = (2 ** scores[i] - 1) - (2 ** scores[j] - 1)
            weight = abs(gain) * abs(discount[i] - discount[j])
            x = BETA * (ratios[i] - ratios[j])
            loss += weight * np.log1p(np.exp(-x))
            slopes[i] -= weight * BETA * s(-x)
            slopes[j] += weight * BETA * s(-x)
    return loss, slopes


EQUATIONS = {"plackett_luce": plackett_luce, "lipo_lambda": lipo_lambda}


def pairs_of(lists=SCORES, *, ids=None):
    """All pairs of the lists, as `ranked: all` makes them, and where their completions are."""
    pairs, where = [], []
    for number, scores in enumerate(lists):
        made = [
            (i, j)
            for i, j in itertools.permutations(range(len(scores)), 2)
            if scores[i] > scores[j]
        ]
        for i, j in made:
            ranking = RankedPair(
                number + 1 if ids is None else ids[number], i, j, scores[i], scores[j],
                max(scores) - min(scores), len(made),
            )  # fmt: skip
            pairs.append(TokenizedPair((number,), (1,), (2,), ranking=ranking))
            where.append((number, i, j))
    return pairs, where


def scored_pairs(pairs, where, ratios):
    chosen = mx.array(np.array([ratios[n][i] for n, i, _ in where], np.float32))
    rejected = mx.array(np.array([ratios[n][j] for n, _, j in where], np.float32))
    zeros = mx.zeros_like(chosen)
    return ScoredPairs(
        PairLogps(chosen, rejected), PairLogps(zeros, zeros), pair_metadata(pairs),
        mx.ones_like(chosen),
    )  # fmt: skip


def value_and_slopes(name, scored):
    """Losses of the pairs, and the slopes of their sum. (B,) each"""
    objective = Objective(LossSettings(loss_type=(name,), beta=BETA))

    def total(chosen, rejected):
        live = scored._replace(policy=PairLogps(chosen, rejected))
        losses = objective.compute_losses(live, log_ratios(live.policy, live.reference))
        return losses.sum(), losses

    (_, losses), slopes = mx.value_and_grad(total, argnums=(0, 1))(*scored.policy)
    return np.array(losses), *map(np.array, slopes)


def by_completion(slopes, where, lists=SCORES):
    """A completion's slope is the sum over the pairs that it is in."""
    sums = [np.zeros(len(scores)) for scores in lists]
    for (n, i, j), chosen, rejected in zip(where, *slopes, strict=True):
        sums[n][i] += chosen
        sums[n][j] += rejected
    return sums


@pytest.mark.parametrize("name", NAMES)
def test_closed_forms_are_the_slopes_of_the_equations(name):
    equation, step = EQUATIONS[name], 1e-5
    for ratios, scores in zip(RATIOS, SCORES, strict=True):
        _, slopes = equation(ratios, scores)
        for i, unit in enumerate(np.eye(len(ratios))):
            up, down = (equation(ratios + sign * step * unit, scores)[0] for sign in (1, -1))
            assert slopes[i] == pytest.approx((up - down) / (2 * step), abs=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_value_and_slopes_are_those_of_the_equation(name):
    """The loss of a list is divided among its pairs, so their sum is the equation's."""
    pairs, where = pairs_of()
    losses, *slopes = value_and_slopes(name, scored_pairs(pairs, where, RATIOS))
    sums = by_completion(slopes, where)
    for n, (ratios, scores) in enumerate(zip(RATIOS, SCORES, strict=True)):
        value, expected = EQUATIONS[name](ratios, scores)
        own = np.array([number == n for number, *_ in where])
        assert losses[own].sum() == pytest.approx(value, rel=2e-6)
        assert np.abs(sums[n] - expected).max() <= 1e-6 * max(1, np.abs(expected).max())


def test_before_the_first_step_plackett_luce_counts_the_orders():
    """All K! orders are equally likely then; DPO's log 2 is that of two completions."""
    lists = ([4.0, 2.0, 1.0, 3.0], [1.0, 2.0])
    pairs, where = pairs_of(lists)
    losses, *_ = value_and_slopes(
        "plackett_luce", scored_pairs(pairs, where, [np.zeros(4), np.zeros(2)])
    )
    assert losses[:6].sum() == pytest.approx(np.log(24), rel=1e-6)
    assert losses[6] == pytest.approx(np.log(2), rel=1e-6)


def test_plackett_luce_of_two_completions_is_dpo():
    lists = [[float(i % 3), 5.0] for i in range(6)]
    ratios = [np.random.default_rng(i).normal(0, 20, 2) for i in range(6)]
    pairs, where = pairs_of(lists)
    scored = scored_pairs(pairs, where, ratios)
    for ours, dpo in zip(
        value_and_slopes("plackett_luce", scored), value_and_slopes("sigmoid", scored), strict=True
    ):
        assert np.abs(ours - dpo).max() <= 2e-6 * max(1.0, np.abs(dpo).max())


def test_plackett_luce_does_not_overflow():
    """Rewards 30,000 apart: the loss is their difference, or nothing."""
    pairs, where = pairs_of([[3.0, 2.0, 1.0]])
    for sign in (1, -1):
        ratios = [np.array([1e5, 0.0, -1e5]) * sign]
        losses, *slopes = value_and_slopes("plackett_luce", scored_pairs(pairs, where, ratios))
        assert losses.sum() == pytest.approx(0 if sign == 1 else BETA * 3e5, rel=1e-5)
        assert np.isfinite(slopes).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_pairs_and_completions_does_not_matter(name):
    draw = np.random.default_rng(3)
    pairs, where = pairs_of()
    losses, *slopes = value_and_slopes(name, scored_pairs(pairs, where, RATIOS))
    order = draw.permutation(len(pairs))
    moved, *_ = value_and_slopes(
        name,
        scored_pairs([pairs[i] for i in order], [where[i] for i in order], RATIOS),
    )
    assert np.allclose(moved, losses[order], rtol=1e-6, atol=0)
    orders = [draw.permutation(len(scores)) for scores in SCORES]  # of completions in their rows
    lists = [[scores[i] for i in order] for scores, order in zip(SCORES, orders, strict=True)]
    ratios = [values[order] for values, order in zip(RATIOS, orders, strict=True)]
    pairs, where = pairs_of(lists)
    other, *others = value_and_slopes(name, scored_pairs(pairs, where, ratios))
    assert other.sum() == pytest.approx(losses.sum(), rel=1e-6)
    before = by_completion(slopes, pairs_of()[1])
    for sums, whole, order in zip(by_completion(others, where, lists), before, orders, strict=True):
        assert np.abs(sums - whole[order]).max() <= 2e-6 * max(1.0, np.abs(whole).max())


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_pairs_changes_no_bit(name):
    """A GPU adds in any order what has the same index, and a run would not resume bit for bit."""
    scores = [list(range(9))]
    pairs, where = pairs_of(scores)
    scored = scored_pairs(pairs, where, [np.random.default_rng(2).normal(0, 3, 9)])
    order = np.random.default_rng(3).permutation(len(pairs)).tolist()
    values = value_and_slopes(name, scored)
    permuted = scored_pairs(
        [pairs[i] for i in order],
        [where[i] for i in order],
        [np.random.default_rng(2).normal(0, 3, 9)],
    )
    for value, other in zip(values, value_and_slopes(name, permuted), strict=True):
        assert value[order].tolist() == other.tolist()


def test_equal_weights_make_lipo_lambda_the_mean_logistic_loss():
    """The losses of the pairs, each divided by its weight, are those of `sigmoid`."""
    pairs, where = pairs_of()
    scored = scored_pairs(pairs, where, RATIOS)
    losses, chosen, _ = value_and_slopes("lipo_lambda", scored)
    plain, slopes, _ = value_and_slopes("sigmoid", scored)
    weights = losses / plain
    assert (weights > 0).all()
    assert weights.max() > 5 * weights.min()
    assert np.allclose(chosen / weights, slopes, rtol=1e-5)
    assert (losses / weights).mean() == pytest.approx(plain.mean(), rel=1e-6)


def ranks_of(ratios, scores):
    """Ranks by the policy, read back from the weights of pairs with a distinct gap."""
    pairs, where = pairs_of([scores])
    scored = scored_pairs(pairs, where, [np.array(ratios)])
    weights = value_and_slopes("lipo_lambda", scored)[0] / value_and_slopes("sigmoid", scored)[0]
    gaps = np.array([2.0 ** scores[i] - 2.0 ** scores[j] for _, i, j in where])
    return {(i, j): w for (_, i, j), w in zip(where, weights / gaps, strict=True)}


def discount(a, b):
    return abs(1 / np.log(1 + a) - 1 / np.log(1 + b))


def test_equal_log_ratios_have_the_ranks_of_the_data():
    """At the first step, rounding alone would order them, and no weight may be zero."""
    noise = np.array([0.2, -0.4, 0.4, -0.1]) * TIE
    for ratios in (np.zeros(4), noise):
        found = ranks_of(ratios, [4.0, 1.0, 3.0, 2.0])
        for (i, j), ranks in {(0, 1): (1, 4), (0, 2): (1, 2), (2, 1): (2, 4)}.items():
            assert found[i, j] == pytest.approx(discount(*ranks), rel=1e-4)


def test_ranks_are_an_order_when_each_log_ratio_is_close_to_the_next():
    """The first and the last are not equal; all three would have rank 2, and no pair a weight."""
    found = ranks_of(np.array([0.0, 0.8, 1.6]) * TIE, [3.0, 2.0, 1.0])
    for (i, j), ranks in {(0, 1): (3, 2), (0, 2): (3, 1), (1, 2): (2, 1)}.items():
        assert found[i, j] == pytest.approx(discount(*ranks), rel=1e-4)


def test_completions_of_equal_score_and_log_ratio_share_their_ranks():
    found = ranks_of([0.0, 0.0, 0.0], [1.0, 1.0, 0.0])
    assert found[0, 2] == pytest.approx(discount(1.5, 3), rel=1e-5)
    assert found[1, 2] == pytest.approx(found[0, 2], rel=1e-6)


def test_a_completion_of_equal_score_still_takes_a_rank():
    """The pair of equals is not there, but the better of them pushes the other down."""
    found = ranks_of([2.0, 5.0, -1.0], [1.0, 1.0, 0.0])
    assert found[0, 2] == pytest.approx(discount(2, 3), rel=1e-5)
    assert found[1, 2] == pytest.approx(discount(1, 3), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_list_that_occurs_twice_is_two_lists(name):
    """As with `--mix 2`: twice the pairs of one list are not one list of more terms."""
    pairs, where = pairs_of(SCORES[:1])
    once, *_ = value_and_slopes(name, scored_pairs(pairs, where, RATIOS))
    twice, *_ = value_and_slopes(name, scored_pairs(pairs * 2, where * 2, RATIOS))
    assert np.allclose(twice, [*once, *once], rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_lists_do_not_meet_each_other(name):
    """The loss of a list is the same whatever else is in the step, plain pairs among it."""
    pairs, where = pairs_of()
    losses, *_ = value_and_slopes(name, scored_pairs(pairs, where, RATIOS))
    alone, places = pairs_of(SCORES[:1])
    own = value_and_slopes(name, scored_pairs(alone, places, RATIOS))[0]
    assert np.allclose(own, losses[: len(own)], rtol=1e-6)
    plain = [TokenizedPair((9,), (1,), (2,))] * 2
    mixed, *_ = value_and_slopes(
        name, scored_pairs([plain[0], *alone, plain[1]], [(1, 0, 1), *places, (1, 2, 1)], RATIOS)
    )
    assert np.allclose(mixed[1:-1], own, rtol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_that_cut_lists_add_up_to_the_step(name, size):
    """Each has its own log-probs only; the others of a list come from the cache."""
    pairs, where = pairs_of()
    scored = scored_pairs(pairs, where, RATIOS)
    losses, *slopes = value_and_slopes(name, scored)
    objective = Objective(LossSettings(loss_type=(name,), beta=BETA))
    order = np.random.default_rng(size).permutation(len(pairs))
    for start in range(0, len(pairs), size):
        at = order[start : start + size].tolist()
        cache = GradCache.of(scored, at)

        def loss(chosen, rejected, cache=cache):
            live = cache.with_gradients(PairLogps(chosen, rejected))
            outputs = objective.compute_outputs(live, log_ratios(live.policy, live.reference))
            return outputs.losses.sum(), cache.select(outputs)

        own = scored.policy.take(at)
        (_, outputs), found = mx.value_and_grad(loss, argnums=(0, 1))(*own)
        assert np.allclose(np.array(outputs.losses), losses[at], rtol=1e-6)
        for ours, whole in zip(found, slopes, strict=True):
            assert np.abs(np.array(ours) - whole[at]).max() <= 1e-6 * np.abs(whole).max()


def test_a_weight_is_that_of_the_whole_list():
    """All pairs of a row have the row's weight."""
    pairs, where = pairs_of(SCORES[:2])
    heavy = [
        replace(pair, weight=3.0 if n == 1 else 1.0)
        for pair, (n, *_) in zip(pairs, where, strict=True)
    ]
    for name in NAMES:
        plain, *_ = value_and_slopes(name, scored_pairs(pairs, where, RATIOS))
        weighed, *_ = value_and_slopes(name, scored_pairs(heavy, where, RATIOS))
        factors = np.array([3.0 if n == 1 else 1.0 for n, *_ in where])
        assert np.allclose(weighed, plain * factors, rtol=1e-6)


def test_the_margin_of_best_and_worst_is_that_of_these_pairs():
    pairs, where = pairs_of(SCORES[:2])
    scored = scored_pairs(pairs, where, RATIOS)
    objective = Objective(LossSettings(loss_type=("plackett_luce",), beta=BETA))
    metrics = compute_metrics(
        objective.compute_outputs(scored, log_ratios(scored.policy, scored.reference))
    )
    first, second = RATIOS[:2]  # the second list has two best completions
    expected = [first[1] - first[3], second[0] - second[1], second[2] - second[1]]
    assert metrics.best_worst_margins == pytest.approx(BETA * np.mean(expected), rel=1e-5)
    ahead = [RATIOS[n][i] > RATIOS[n][j] for n, i, j in where]
    assert metrics.accuracies == pytest.approx(np.mean(ahead))


def test_plain_pairs_have_no_best_and_worst():
    pairs = [TokenizedPair((9,), (1,), (2,))] * 3
    scored = scored_pairs(pairs, [(0, 0, 1)] * 3, RATIOS)
    outputs = Objective(LossSettings()).compute_outputs(scored, scored.policy)
    assert compute_metrics(outputs).best_worst_margins is None


def test_the_standard_error_of_lists_takes_a_list_as_one_value():
    """Lists of equal size: it is that of the means of the lists; of the pairs it is too small."""
    lists = [[3.0, 2.0, 1.0]] * 5
    ratios = [np.random.default_rng(i).normal(0, 2, 3) for i in range(5)]
    pairs, where = pairs_of(lists)
    scored = scored_pairs(pairs, where, ratios)
    objective = Objective(LossSettings(beta=1.0))
    metrics = compute_metrics(objective.compute_outputs(scored, scored.policy))
    means = [(x[0] - x[1] + x[0] - x[2] + x[1] - x[2]) / 3 for x in ratios]
    assert metrics.margins_stderr == pytest.approx(np.std(means, ddof=1) / np.sqrt(5), rel=1e-5)
    pairs, where = pairs_of(lists[:1])
    scored = scored_pairs(pairs, where, ratios)
    metrics = compute_metrics(objective.compute_outputs(scored, scored.policy))
    assert metrics.margins_stderr is None
