"""A judge opened by what the user named: a reward function, or a model."""

from collections.abc import Sequence
from pathlib import Path

from mlx_dpo.conversation.streaming import answer_in
from mlx_dpo.errors import ConfigError
from mlx_dpo.evaluation.judging import ModelJudge, default_rubric, read_rubric
from mlx_dpo.evaluation.ranking import Judge
from mlx_dpo.evaluation.rewards import load_reward
from mlx_dpo.policy.generation import prompt_tokens
from mlx_dpo.policy.sampling import Sampling
from mlx_dpo.runs.voices import open_voice
from mlx_dpo.types import Message

JUDGED = Sampling(max_tokens=512)  # greedy: the same verdict each time


def check_judge(reward: str | None, judge: str | None, rubric: str | None) -> None:
    """Refuse what contradicts itself, before anything is loaded.

    Raises:
        ConfigError: names the settings.
    """
    if reward is not None and judge is not None:
        raise ConfigError("`judge` has no effect beside `reward`; leave one of them out")
    if rubric is not None and judge is None:
        raise ConfigError("`rubric` has no effect without `judge`")


def open_judge(reward: str | None, judge: str | None, rubric: str | None) -> Judge:
    """The judge; a model is loaded now.

    Raises:
        ConfigError: neither or both are named, or the function or the rubric is not as it must be.
        ModelError: the model cannot be read.
    """
    check_judge(reward, judge, rubric)
    if reward is not None:
        return load_reward(reward)
    if judge is None:
        raise ConfigError("who judges is missing; give --reward file.py:function or --judge MODEL")
    text = default_rubric() if rubric is None else read_rubric(Path(rubric))
    voice = open_voice(None, model=judge)

    def ask(conversations: Sequence[Sequence[Message]]) -> list[str]:
        return voice.answer(conversations, JUDGED) if conversations else []

    def answered(asked: Sequence[Message], said: str) -> str:
        tokenizer = voice.base.tokenizer
        return answer_in(tokenizer, prompt_tokens(tokenizer, asked), said)

    digest = voice.facts["model_digest"]
    return ModelJudge(judge, ask, text, answered=answered, judge_digest=digest)
