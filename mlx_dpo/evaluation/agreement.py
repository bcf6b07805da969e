"""Agreement of people who judged the same pairs of answers, and the bias for the first answer."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean


@dataclass(frozen=True, slots=True)
class Agreement:
    """How often raters gave the same verdict, over every two of them."""

    raw: float  # share of equal verdicts; the mean over pairs of raters
    kappa: float | None  # Cohen's, the mean over pairs of raters; None if it is undefined for one
    counts: tuple[int, ...]  # prompts that both raters of a pair judged


def measure_agreement(verdicts: Sequence[Mapping[str, Hashable]]) -> Agreement | None:
    """Return the agreement of two or more raters; None if two of them judged no prompt in common.

    For more than two raters, raw agreement and kappa are means over all pairs of raters. The mean
    kappa is Light's (Light 1971, Psychol. Bull. 76, 365-377).

    Args:
        verdicts: for each rater, the verdict on each prompt that this rater judged.
    """
    raw, kappas, counts = [], [], []
    for first, second in combinations(verdicts, 2):
        pairs = [(first[key], second[key]) for key in first if key in second]
        if not pairs:
            return None
        raw.append(fmean(a == b for a, b in pairs))
        kappas.append(cohen_kappa(pairs))
        counts.append(len(pairs))
    if not counts:
        return None
    defined = [kappa for kappa in kappas if kappa is not None]
    kappa = fmean(defined) if len(defined) == len(kappas) else None
    return Agreement(fmean(raw), kappa, tuple(counts))


def cohen_kappa(pairs: Sequence[tuple[Hashable, Hashable]]) -> float | None:
    """Return Cohen's kappa of two raters: the agreement beyond that expected by chance.

        (p_o - p_e) / (1 - p_e)

    p_o is the share of equal verdicts, p_e = Σ_k p_1k p_2k, and p_rk the share of verdict k among
    those of rater r. The result is None if p_e is 1, because both always gave the same verdict.

    Args:
        pairs: verdicts of both raters on each prompt; at least one.

    Source: Cohen 1960, Educ. Psychol. Meas. 20, 37-46.
    """
    count = len(pairs)
    equal = sum(a == b for a, b in pairs)
    first, second = (Counter(column) for column in zip(*pairs, strict=True))
    expected = sum(first[verdict] * second[verdict] for verdict in first)  # times count²
    if expected == count * count:
        return None
    return (equal * count - expected) / (count * count - expected)
