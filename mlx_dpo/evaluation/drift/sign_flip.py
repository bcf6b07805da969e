"""An exact test for paired counts that come in groups."""

from collections import Counter
from collections.abc import Iterable


def sign_flip_p_value(differences: Iterable[int]) -> float:
    """Return the two-sided p-value of Fisher's exact sign-flip test that differences are noise.

    Each difference is the change of one independent group of items, after minus before. Without an
    effect of training, each could as well have had the other sign:

        p = |{s in {-1, 1}^n : |sum_i s_i d_i| >= |sum_i d_i|}| / 2^n

    The distribution of the sum is computed exactly, by convolution. If every group is one item
    that changed or not, this is McNemar's exact test: the binomial test on the discordant pairs
    (McNemar 1947, Psychometrika 12, 153-157). Translations of one prompt are answered
    similarly, so that they are one group; to count them as independent would give too small a p.

    Source: Fisher 1935, The Design of Experiments, section 21.
    """
    changed = [difference for difference in differences if difference]
    sums = Counter({0: 1})  # number of sign choices by their sum
    for difference in changed:
        flipped: Counter[int] = Counter()
        for total, count in sums.items():
            flipped[total + difference] += count
            flipped[total - difference] += count
        sums = flipped
    observed = abs(sum(changed))
    extreme = sum(count for total, count in sums.items() if abs(total) >= observed)
    return float(extreme / 2 ** len(changed))
