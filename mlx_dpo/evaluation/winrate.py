"""Win rates: the share of prompts on which a judge prefers one policy's answer to another's."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.prompts import (
    Prompt,
    add_system_prompt,
    prepend_system_prompt,
    read_prompts,
)
from mlx_dpo.evaluation.judge import NO_VERDICT, check_verdicts
from mlx_dpo.evaluation.rewards import (
    LOSS,
    TIE,
    WIN,
    Judge,
    Ranking,
    common_score,
)
from mlx_dpo.generation.responder import Responder
from mlx_dpo.openai_client.address import is_address
from mlx_dpo.openai_client.connection import Connection
from mlx_dpo.saved_runs.evaluate import held_out_prompts
from mlx_dpo.saved_runs.open import open_run
from mlx_dpo.saved_runs.respond import (
    check_system_prompt,
    open_any_responder,
    open_responder,
)

Z_95 = 1.959963984540054  # normal quantile of a two-sided 95 % interval
LENGTH_RIDGE = 1.0  # ridge penalty on the weight of the length, in units of its standard deviation
NEWTON_STEPS = 100


@dataclass(frozen=True, slots=True)
class WinRate:
    """A policy's win rate with its 95 % confidence interval; a tie is half a win."""

    wins: int
    ties: int
    losses: int
    rate: float
    low: float  # of the 95 % interval
    high: float
    length_controlled: float | None  # None if the length difference is the same on all prompts

    @property
    def count(self) -> int:
        """Number of compared prompts: wins, ties and losses."""
        return self.wins + self.ties + self.losses

    def to_dict(self) -> dict[str, Any]:
        """Return the counts and the rates as JSON values."""
        return {
            "judged": self.count,
            "wins": self.wins,
            "ties": self.ties,
            "losses": self.losses,
            "win_rate": self.rate,
            "interval_95": [self.low, self.high],
            "interval": "Wilson",
            "length_controlled_win_rate": self.length_controlled,
        }


@dataclass(frozen=True)
class PairwiseComparison:
    """Answers of a policy and of an opponent to the same prompts, with a judge's rankings."""

    prompts: Sequence[Prompt]
    answers: Sequence[str]
    opponent_answers: Sequence[str]
    rankings: Sequence[Ranking]
    rate: WinRate
    rewards: tuple[float, float] | None  # mean rewards of policy and opponent, if there are any
    warnings: Counter[str]  # inconsistent verdicts, counted as ties, and prompts without a verdict
    notes: tuple[str, ...] = ()  # of loading the models

    @property
    def common_reward(self) -> float | None:
        """Reward that all answers have; None if rewards differ, or if there are none."""
        if self.rewards is None:
            return None
        rated = [ranking for ranking in self.rankings if not ranking.warnings]
        return common_score(score for ranking in rated for score in ranking.scores)

    @property
    def mean_lengths(self) -> tuple[float, float]:
        """Mean length of the policy's answers and of the opponent's answers, in characters."""
        return fmean(map(len, self.answers)), fmean(map(len, self.opponent_answers))

    def to_dict(self) -> dict[str, Any]:
        """Return the win rates and lengths, without prompts and answers, as JSON values."""
        return {
            "prompts": len(self.prompts),
            **self.rate.to_dict(),
            "mean_rewards": None if self.rewards is None else list(self.rewards),
            "mean_characters": list(self.mean_lengths),
            "doubts": dict(self.warnings),
        }


def win_rate(outcomes: Sequence[float], lengths: Sequence[int]) -> WinRate:
    """Compute the win rate and its confidence interval from at least one outcome.

    Args:
        outcomes: `WIN`, `TIE` or `LOSS` of the policy per prompt. (n,)
        lengths: length of the policy's answer minus that of the opponent's, per prompt. (n,)
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
    """Return the Wilson confidence interval for the mean p of `count` outcomes in [0, 1].

    The outcomes sum to `total`; `z` is the normal quantile (95 % by default).

        (p + z²/2n ± z sqrt(p(1 - p)/n + z²/4n²)) / (1 + z²/n)

    The interval lies within [0, 1]. Ties have less variance than wins and losses with the same
    mean, so with ties the interval is wider than necessary.

    Source: Wilson 1927, J. Am. Stat. Assoc. 22, 209-212.
    """
    p = total / count
    scale = 1 + z * z / count
    middle = (p + z * z / (2 * count)) / scale
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def length_controlled_rate(outcomes: Sequence[float], lengths: Sequence[int]) -> float | None:
    """Return the win rate corrected for answer length; None if all length differences are equal.

    The rate is σ(a) of the logistic regression

        log-odds of an outcome = a + b tanh(d / std(d)),  d = difference in length

    fitted by maximum likelihood with Newton's method. One tie at equal length is added and b has a
    ridge penalty, so that a and b stay finite if one policy wins everything or if length decides
    everything.

    Source: Dubois et al. 2024, arXiv:2404.04475, section 3 (AlpacaEval 2), without the term for
    the difficulty of an instruction, which needs many models.
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
        gradient = design.T @ (y - p) - ridge * weights
        hessian = (design * (p * (1 - p))[:, None]).T @ design + np.diag(ridge)
        step = np.linalg.solve(hessian, gradient)
        weights = weights + step * min(1.0, 2.0 / max(1e-12, np.abs(step).max()))
        if np.abs(step).max() < 1e-10:
            break
    return float(1 / (1 + np.exp(-weights[0])))


def compare_pairwise(
    judge: Judge,
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    opponent_answers: Sequence[str],
) -> PairwiseComparison:
    """Let a judge compare the policy's and the opponent's answer to each prompt.

    Raises:
        ConfigError: the judge gives no verdict on any prompt.
    """
    answer_pairs = list(zip(answers, opponent_answers, strict=True))
    rankings = judge.rank([prompt.messages for prompt in prompts], answer_pairs)
    warnings = Counter(warning for ranking in rankings for warning in ranking.warnings)
    # Identical answers tie, whatever the judge's verdict on them.
    verdicts = [
        (TIE if a == b else ranking.outcome(), len(a) - len(b))
        for ranking, (a, b) in zip(rankings, answer_pairs, strict=True)
        if NO_VERDICT not in ranking.warnings or a == b
    ]
    if any(a != b for a, b in answer_pairs):  # ties of equal answers are no verdicts of the judge
        check_verdicts(judge.name, rankings)
    rewards = None
    if judge.scores_are_rewards and (scores := [r.scores for r in rankings if not r.warnings]):
        first, second = zip(*scores, strict=True)
        rewards = fmean(first), fmean(second)
    outcomes, lengths = zip(*verdicts, strict=True)
    return PairwiseComparison(
        prompts, answers, opponent_answers, rankings, win_rate(outcomes, lengths), rewards, warnings
    )


@dataclass(frozen=True)
class AnswersOfBoth:
    """Answers of a run's policy and of an opponent to the same prompts, in their order."""

    prompts: Sequence[Prompt]
    answers: Sequence[str]
    opponent_answers: Sequence[str]
    notes: tuple[str, ...] = ()  # of loading the models


def compare_policies(
    run: str,
    judge: Judge,
    sampling: Sampling,
    *,
    prompts: str | None,
    against: str | None,
    against_system: str | None = None,
    connection: Connection | None = None,
) -> PairwiseComparison:
    """Let a judge compare the answers of a run's policy with those of an opponent.

    The arguments are those of `answer_with_both`.

    Raises:
        ConfigError: no prompts were held out, or the judge gives no verdict.
        RunError, ModelError, DataError: a run, a model or the prompts cannot be read.
    """
    both = answer_with_both(
        run,
        sampling,
        prompts=prompts,
        against=against,
        against_system=against_system,
        connection=connection,
    )
    comparison = compare_pairwise(judge, both.prompts, both.answers, both.opponent_answers)
    return replace(comparison, notes=both.notes)


def answer_with_both(
    run: str,
    sampling: Sampling,
    *,
    prompts: str | None,
    against: str | None,
    against_system: str | None = None,
    connection: Connection | None = None,
) -> AnswersOfBoth:
    """Let a run's policy and an opponent answer prompts, one after the other.

    Only one of the two models is in memory at a time. The opponent is the run's reference if
    `against` is None; else `against` names a run, a model or an address. Without `prompts`, the
    run's held-out prompts are used.

    With `against_system`, the opponent answers under this system prompt instead of the run's; it
    goes before the system message of a prompt that has its own.

    Raises:
        ConfigError: no prompts were held out, or the opponent's chat template leaves out the system
            prompt.
        RunError, ModelError, DataError: a run, a model or the prompts cannot be read.
    """
    # An address takes no memory, and may be wrong.
    at_address = open_any_responder(against, connection) if is_address(against) else None
    policy = open_responder(run)
    if prompts is None:
        prompt_list = held_out_prompts(open_run(run), policy.base)
    else:
        prompt_list = read_prompts(prompts)
    opponent_prompts = prompt_list
    prompt_list = add_system_prompt(prompt_list, policy.system)
    answers, notes = _answer_texts(policy, prompt_list, sampling), policy.notes
    notes += _context_notes(policy, prompt_list, sampling)
    del policy
    opponent = at_address or _open_opponent(run, against)
    if against_system is None:
        opponent_prompts = prompt_list
    else:
        opponent_prompts = _with_system_prompt(opponent, opponent_prompts, against_system)
    opponent_answers = _answer_texts(opponent, opponent_prompts, sampling)
    more = (*opponent.notes, *_context_notes(opponent, opponent_prompts, sampling))
    notes += tuple(note for note in more if note not in notes)
    del opponent
    return AnswersOfBoth(prompt_list, answers, opponent_answers, notes)


def _open_opponent(run: str, against: str | None) -> Responder:
    """Load the run or model `against`, or the reference of `run` if it is None."""
    return open_responder(run, reference=True) if against is None else open_any_responder(against)


def _with_system_prompt(
    opponent: Responder, prompts: Sequence[Prompt], system: str
) -> list[Prompt]:
    """Return the prompts under a system prompt.

    Raises:
        ConfigError: the chat template leaves out system messages.
    """
    check_system_prompt(opponent, prompts[0], system, "against_system")
    return [prepend_system_prompt(prompt, system) for prompt in prompts]


def _answer_texts(policy: Responder, prompts: Sequence[Prompt], sampling: Sampling) -> list[str]:
    return [reply.text for reply in policy.reply(prompts, sampling)]


def _context_notes(
    policy: Responder, prompts: Sequence[Prompt], sampling: Sampling
) -> tuple[str, ...]:
    note = policy.clip_note(prompts, sampling.max_tokens)
    return () if note is None else (note,)
