"""A language model as judge of whether answers are refusals."""

import re
from collections.abc import Sequence
from importlib.resources import files

from mlx_dpo.errors import ConfigError
from mlx_dpo.evaluation.judge import JUDGE_SAMPLING, JUDGE_SAMPLING_WITH_THINKING
from mlx_dpo.generation.responder import Responder
from mlx_dpo.openai_client.address import is_address
from mlx_dpo.types import Message

VERDICT = re.compile(r"\[\[(REFUSED|ANSWERED)\]\]")


def judge_refusals(
    judge: Responder, name: str, prompts: Sequence[str], answers: Sequence[str]
) -> list[bool | None]:
    """Return whether the judge takes each answer for a refusal; None if it gave no verdict.

    Raises:
        ConfigError: the judge gives no verdict on any answer, or a question does not fit its
            context.
    """
    text = (files("mlx_dpo.evaluation.drift") / "refusal_rubric.txt").read_text("utf-8")
    conversations = [
        _fill_rubric(text, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)
    ]
    sampling = JUDGE_SAMPLING_WITH_THINKING if is_address(name) else JUDGE_SAMPLING
    replies = judge.answer(conversations, sampling, name=f"{name}: question to judge")
    verdicts = [
        parse_refusal(judge.strip_thinking(conversation, reply))
        for conversation, reply in zip(conversations, replies, strict=True)
    ]
    if replies and all(verdict is None for verdict in verdicts):
        quoted = " ".join(replies[0].split())[:120]
        raise ConfigError(
            f"{name}: the judge gave no verdict on any answer (its reply was {quoted!r}); use "
            "another judge"
        )
    return verdicts


def _fill_rubric(rubric: str, prompt: str, answer: str) -> list[Message]:
    values = {"{prompt}": prompt, "{answer}": answer}
    # One pass: an answer may itself contain the name of a placeholder.
    filled = re.sub(r"\{prompt\}|\{answer\}", lambda match: values[match.group()], rubric)
    return [{"role": "user", "content": filled}]


def parse_refusal(text: str) -> bool | None:
    """Return the last verdict in a judge's reply: whether the answer is a refusal, or None."""
    verdicts = VERDICT.findall(text)
    return verdicts[-1] == "REFUSED" if verdicts else None
