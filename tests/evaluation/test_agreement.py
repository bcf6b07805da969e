"""Agreement of raters, and the bias for the answer shown first, by hand."""

import pytest

from mlx_dpo.evaluation.agreement import cohen_kappa, measure_agreement
from mlx_dpo.evaluation.person import PositionBias, RaterResult, Vote, rater_agreement
from mlx_dpo.evaluation.rewards import LOSS, TIE, WIN


def pairs(**counts):
    return [tuple(cell) for cell, count in counts.items() for _ in range(count)]


@pytest.mark.parametrize(
    ("counts", "kappa"),
    [
        # p_o = 35/50 = 0.7, p_e = 0.5 · 0.6 + 0.5 · 0.4 = 0.5
        ({"yy": 20, "yn": 5, "ny": 10, "nn": 15}, 0.4),
        # The same raw agreement; p_e = 0.9 · 0.8 + 0.1 · 0.1 + 0 · 0.1 = 0.73
        ({"yy": 7, "yn": 1, "ny": 1, "yt": 1}, (0.7 - 0.73) / (1 - 0.73)),
        ({"yy": 3, "nn": 2}, 1.0),
        ({"yn": 1, "ny": 1}, -1.0),
        ({"yn": 4}, 0.0),
        ({"yy": 4}, None),
    ],
)
def test_cohens_kappa_by_hand(counts, kappa):
    found = cohen_kappa(pairs(**counts))
    assert found == (None if kappa is None else pytest.approx(kappa, abs=1e-12))


def test_the_order_of_raters_and_the_names_of_verdicts_do_not_matter():
    given = pairs(yy=6, yn=3, ny=1, nn=4, yt=2, tt=5)
    swapped = [(b.upper(), a.upper()) for a, b in given]
    assert cohen_kappa(swapped) == pytest.approx(cohen_kappa(given), abs=1e-12)


def test_only_prompts_that_both_judged_count():
    found = measure_agreement([{"a": WIN, "b": LOSS, "c": TIE}, {"b": LOSS, "c": WIN, "d": WIN}])
    assert (found.raw, found.counts) == (0.5, (2,))
    assert found.kappa == pytest.approx((0.5 - 0.25) / 0.75)
    assert measure_agreement([{"a": WIN}, {"b": WIN}]) is None
    assert measure_agreement([{"a": WIN}]) is None


def test_of_three_raters_the_mean_over_pairs_is_given():
    first = {"a": WIN, "b": LOSS}
    found = measure_agreement([first, first, {"a": LOSS, "b": WIN}])
    assert found.raw == pytest.approx((1 + 0 + 0) / 3)
    assert found.kappa == pytest.approx((1 - 1 - 1) / 3)
    assert found.counts == (2, 2, 2)
    undefined = measure_agreement([first, first, {"a": WIN}, {"a": WIN}])
    assert undefined.kappa is None


def rater(name, *votes, **counts):
    return RaterResult(name, [Vote(*vote) for vote in votes], **counts)


def test_the_rate_counts_identical_answers_as_ties_and_skips_as_nothing():
    ann = rater(
        "ann", ("p", WIN, 5, True), ("q", WIN, -2, False), ("r", LOSS, 0, True),
        identical=1, skipped=3, undecided=2,
    )  # fmt: skip
    rate = ann.rate
    assert (rate.wins, rate.ties, rate.losses, rate.rate) == (2, 1, 1, 2.5 / 4)
    assert ann.position == PositionBias(2, 3)
    assert ann.position.share == pytest.approx(2 / 3)
    fields = ann.to_dict()
    assert (fields["judged"], fields["skipped"], fields["undecided"]) == (4, 3, 2)
    low, high = fields["first_shown_won_interval_95"]
    assert low < 2 / 3 < high


def test_ties_have_no_position_and_nothing_decided_has_no_rate():
    tied = rater("ann", ("p", TIE, 3, None))
    assert tied.position is None
    assert tied.rate.rate == 0.5
    assert rater("ben").rate is None
    assert rater("ben").to_dict()["judged"] == 0
    # A rater who has not begun does not make the agreement of the others undefined.
    ann = rater("ann", ("p", WIN, 3, True))
    assert rater_agreement([ann, rater("ben"), ann]).raw == 1.0
