"""How often one of two answers is preferred: a rate, its interval, and the same at equal length.

Numbers in, numbers out; who judged is not known here.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.prompts import Prompt, add_system_prompt, read_prompts
from mlx_dpo.evaluation.judge import NO_VERDICT, check_verdicts
from mlx_dpo.evaluation.rewards import LOSS, TIE, WIN, Judge, Ranking, RewardFunction
from mlx_dpo.runs.folder import RunPaths
from mlx_dpo.saved_runs.evaluate import held_out_prompts
from mlx_dpo.saved_runs.open import open_run
from mlx_dpo.saved_runs.respond import open_responder

Z_95 = 1.959963984540054  # of a two-sided interval of 95 %
LENGTH_RIDGE = 1.0  # on the weight of length, in units of its own spread
NEWTON_STEPS = 100


@dataclass(frozen=True, slots=True)
class WinRate:
    """The share of prompts on which one side is preferred; a tie is half a win."""

    wins: int
    ties: int
    losses: int
    rate: float
    low: float  # of the interval of 95 %
    high: float
    length_controlled: float | None  # None where all pairs of answers differ alike in length

    @property
    def count(self) -> int:
        """Prompts."""
        return self.wins + self.ties + self.losses


def win_rate(outcomes: Sequence[float], lengths: Sequence[int]) -> WinRate:
    """Of `outcomes` (1 won, 0.5 tied, 0 lost); `lengths` say how much longer that side's answer is.

    Needs at least one outcome.
    """
    count, total = len(outcomes), math.fsum(outcomes)
    low, high = wilson_interval(total, count)
    return WinRate(
        wins=sum(value == WIN for value in outcomes),
        ties=sum(value == TIE for value in outcomes),
        losses=sum(value == LOSS for value in outcomes),
        rate=total / count,
        low=low,
        high=high,
        length_controlled=length_controlled_rate(outcomes, lengths),
    )


def wilson_interval(total: float, count: int, *, z: float = Z_95) -> tuple[float, float]:
    """Interval for the mean of `count` outcomes that sum to `total`.

        (p + z²/2n ± z sqrt(p(1 - p)/n + z²/4n²)) / (1 + z²/n)

    Exactly 0 and 1 stay possible and the ends stay inside of them. Ties spread less than wins
    and losses of the same mean, so that with ties it is rather too wide than too narrow.

    Source: Wilson 1927, J. Am. Stat. Assoc. 22, 209-212.
    """
    p = total / count
    scale = 1 + z * z / count
    middle = (p + z * z / (2 * count)) / scale
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def length_controlled_rate(outcomes: Sequence[float], lengths: Sequence[int]) -> float | None:
    """The rate at equal length: σ(a) of the regression that follows, or None without spread.

        log-odds of an outcome = a + b tanh(d / std(d)),  d = difference in length

    fitted by maximum likelihood, with one tie at equal length added and a ridge on b, so that a
    and b stay finite where one side wins everything or length decides everything.

    Source: Dubois et al. 2024, arXiv:2404.04475, section 3 (AlpacaEval 2), without its term
    for the difficulty of an instruction, which needs many models.
    """
    d = np.asarray(lengths, float)
    spread = d.std()
    if spread == 0:
        return None
    x = np.append(np.tanh(d / spread), 0.0)
    y = np.append(np.asarray(outcomes, float), TIE)
    design = np.stack([np.ones_like(x), x], axis=1)
    ridge = np.array([0.0, LENGTH_RIDGE])
    weights = np.zeros(2)
    for _ in range(NEWTON_STEPS):
        p = 1 / (1 + np.exp(-design @ weights))
        slope = design.T @ (y - p) - ridge * weights
        curve = (design * (p * (1 - p))[:, None]).T @ design + np.diag(ridge)
        step = np.linalg.solve(curve, slope)
        weights = weights + step * min(1.0, 2.0 / max(1e-12, np.abs(step).max()))
        if np.abs(step).max() < 1e-10:
            break
    return float(1 / (1 + np.exp(-weights[0])))


@dataclass(frozen=True)
class PairwiseComparison:
    """What a judge made of the answers of a policy and of its opponent."""

    prompts: Sequence[Prompt]
    answers: Sequence[str]
    opposed: Sequence[str]  # the opponent's answers
    rankings: Sequence[Ranking]
    rate: WinRate
    rewards: tuple[float, float] | None  # means of both sides, of a reward function
    doubts: Counter[str]  # disagreements, which are ties here, and prompts without a verdict
    notes: tuple[str, ...] = ()  # of loading

    @property
    def lengths(self) -> tuple[float, float]:
        """Mean length of both sides' answers, in characters."""
        return fmean(map(len, self.answers)), fmean(map(len, self.opposed))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        rate = self.rate
        return {
            "prompts": len(self.prompts),
            "judged": rate.count,
            "wins": rate.wins,
            "ties": rate.ties,
            "losses": rate.losses,
            "win_rate": rate.rate,
            "interval_95": [rate.low, rate.high],
            "interval": "Wilson",
            "length_controlled_win_rate": rate.length_controlled,
            "mean_rewards": None if self.rewards is None else list(self.rewards),
            "mean_characters": list(self.lengths),
            "doubts": dict(self.doubts),
        }


def compare_pairwise(
    judge: Judge, prompts: Sequence[Prompt], answers: Sequence[str], opposed: Sequence[str]
) -> PairwiseComparison:
    """Let a judge compare two answers to each prompt.

    Raises:
        ConfigError: it gives no verdict on any of them.
    """
    both = list(zip(answers, opposed, strict=True))
    rankings = judge.rank([prompt.messages for prompt in prompts], both)
    doubts = Counter(doubt for ranking in rankings for doubt in ranking.doubts)
    # Alike answers tie, whatever a judge makes of reading the same twice.
    clear = [
        (0.5 if a == b else ranking.outcome(), len(a) - len(b))
        for ranking, (a, b) in zip(rankings, both, strict=True)
        if NO_VERDICT not in ranking.doubts or a == b
    ]
    if not clear:
        check_verdicts(judge.name, rankings)
    means = None
    if isinstance(judge, RewardFunction):
        first, second = zip(*(ranking.points for ranking in rankings), strict=True)
        means = fmean(first), fmean(second)
    outcomes, lengths = zip(*clear, strict=True)
    return PairwiseComparison(
        prompts, answers, opposed, rankings, win_rate(outcomes, lengths), means, doubts
    )


def compare_policies(
    run: str, judge: Judge, sampling: Sampling, *, prompts: str | None, against: str | None
) -> PairwiseComparison:
    """The policy of a run against what it started from, or against another run or model.

    One of them is in memory at a time. Without `prompts` the run is asked those it held out.

    Raises:
        ConfigError: no prompts were held out, or the judge gives no verdict.
        RunError, ModelError, DataError: a run, a model or the prompts are at fault.
    """
    opened = open_run(run)
    voice = open_responder(run)
    asked = held_out_prompts(opened, voice.base) if prompts is None else read_prompts(prompts)
    asked = add_system_prompt(asked, voice.system)
    answers, notes = voice.say(asked, sampling), voice.base.notes
    del voice
    if against is None:
        opponent = open_responder(run, reference=True)
    elif RunPaths(Path(against).expanduser()).record.is_file():
        opponent = open_responder(against)
    else:
        opponent = open_responder(None, model=against)
    opposed = opponent.say(asked, sampling)
    notes += tuple(note for note in opponent.base.notes if note not in notes)
    del opponent
    return replace(compare_pairwise(judge, asked, answers, opposed), notes=notes)
