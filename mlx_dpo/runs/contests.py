"""Two policies' answers to the same prompts, judged: a win rate, with what went into it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from mlx_dpo.evaluation.judging import UNCLEAR, refuse_mute
from mlx_dpo.evaluation.ranking import Judge, Ranking
from mlx_dpo.evaluation.rewards import Reward
from mlx_dpo.evaluation.winrates import WinRate, win_rate
from mlx_dpo.policy.sampling import Sampling
from mlx_dpo.preferences.prompts import Prompt, read_prompts, with_system
from mlx_dpo.runs.paths import RunPaths
from mlx_dpo.runs.policies import open_run
from mlx_dpo.runs.questions import prompts_held_out
from mlx_dpo.runs.voices import open_voice


@dataclass(frozen=True)
class Contest:
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


def hold(
    judge: Judge, prompts: Sequence[Prompt], answers: Sequence[str], opposed: Sequence[str]
) -> Contest:
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
        if UNCLEAR not in ranking.doubts or a == b
    ]
    if not clear:
        refuse_mute(judge.name, rankings)
    means = None
    if isinstance(judge, Reward):
        first, second = zip(*(ranking.points for ranking in rankings), strict=True)
        means = fmean(first), fmean(second)
    outcomes, lengths = zip(*clear, strict=True)
    return Contest(prompts, answers, opposed, rankings, win_rate(outcomes, lengths), means, doubts)


def contest(
    run: str, judge: Judge, sampling: Sampling, *, prompts: str | None, against: str | None
) -> Contest:
    """The policy of a run against what it started from, or against another run or model.

    One of them is in memory at a time. Without `prompts` the run is asked those it held out.

    Raises:
        ConfigError: no prompts were held out, or the judge gives no verdict.
        RunError, ModelError, DataError: a run, a model or the prompts are at fault.
    """
    opened = open_run(run)
    voice = open_voice(run)
    asked = prompts_held_out(opened, voice.base) if prompts is None else read_prompts(prompts)
    asked = with_system(asked, voice.system)
    answers, notes = voice.say(asked, sampling), voice.base.notes
    del voice
    if against is None:
        opponent = open_voice(run, reference=True)
    elif RunPaths(Path(against).expanduser()).record.is_file():
        opponent = open_voice(against)
    else:
        opponent = open_voice(None, model=against)
    opposed = opponent.say(asked, sampling)
    notes += tuple(note for note in opponent.base.notes if note not in notes)
    del opponent
    return replace(hold(judge, asked, answers, opposed), notes=notes)
