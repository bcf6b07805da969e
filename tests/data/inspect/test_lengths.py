"""Distributions of lengths, and the length bias between chosen and rejected completions."""

import pytest

from mlx_dpo.data.inspect.lengths import Bin, Lengths, LengthSummary

PARTS = ("prompt", "chosen", "rejected")


def lengths(*rows):
    found = Lengths("tokens", PARTS)
    for row in rows:
        found.add(*row)
    return found


def test_quantiles_are_lengths_of_the_data():
    found = lengths(*((i, 2 * i, 7) for i in range(1, 101)))
    # Of 1 to 100 the median lies between 50 and 51; the longer one is said.
    assert found.summaries() == {
        "prompt": LengthSummary(51, 96, 100),
        "chosen": LengthSummary(102, 192, 200),
        "rejected": LengthSummary(7, 7, 7),
    }


def test_bins_double_and_contain_every_length_once():
    found = lengths((0, 1, 2), (3, 4, 7), (8, 2, 2))
    assert found.histogram() == [
        Bin(0, 0, (1, 0, 0)), Bin(1, 1, (0, 1, 0)), Bin(2, 3, (1, 1, 2)), Bin(4, 7, (0, 1, 1)),
        Bin(8, 15, (1, 0, 0)),
    ]  # fmt: skip


def test_length_bias_by_hand():
    """Of 4, 1, 2 and 1, 1, 3: chosen longer, equal, rejected longer.

    The six lengths 4 1 2 1 1 3 have mean 2 and variance 8/6; being chosen has 1/4. Their
    covariance is (7 - 5) / 6 / 2 = 1/6, so r = (1/6) / sqrt(8/6 / 4) = 0.2887.
    """
    bias = lengths((0, 4, 1), (0, 1, 1), (0, 2, 3)).bias()
    assert (bias.pairs, bias.chosen_longer, bias.rejected_longer) == (3, 1, 1)
    assert bias.correlation == pytest.approx(0.288675, abs=1e-6)
    assert bias.accuracy == 0.5
    assert not bias.is_significant


def test_a_length_bias_of_all_pairs_is_significant():
    bias = lengths(*[(0, 1, 2)] * 10).bias()
    assert (bias.accuracy, bias.correlation, bias.is_significant) == (1.0, -1.0, True)
    assert not lengths(*[(0, 1, 2)] * 9).bias().is_significant


def test_constant_lengths_have_no_correlation():
    assert lengths((1, 5, 5), (2, 5, 5)).bias().correlation is None


def test_unpaired_examples_have_no_length_bias():
    found = Lengths("tokens", ("prompt", "answer"))
    found.add(1, 2)
    assert found.bias() is None
    assert found.to_dict()["answer"] == {"median": 2, "most": 2, "longest": 2}
