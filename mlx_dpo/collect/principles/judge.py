"""Judge of revisions: it compares two answers by the principles that were drawn for the prompt."""

from pathlib import Path

from mlx_dpo.collect.principles.principle_set import PrincipleDraw, principle_rubric
from mlx_dpo.evaluation.judge import (
    ModelJudge,
    check_judge,
    make_model_judge,
    open_judge,
    read_rubric,
)
from mlx_dpo.evaluation.rewards import Judge
from mlx_dpo.generation.responder import Responder
from mlx_dpo.openai_client.connection import Connection


def check_principle_judge(reward: str | None, judge: str | None, rubric: str | None) -> None:
    """Check that the arguments for a judge fit together; without one, the model judges itself.

    Raises:
        ConfigError: two arguments contradict each other, or one has no effect.
    """
    itself = "itself" if reward is None else None
    check_judge(reward, judge or itself, rubric)


def open_principle_judge(
    reward: str | None,
    judge: str | None,
    rubric: str | None,
    connection: Connection | None,
    responder: Responder | None,
) -> Judge:
    """Load the judge of revisions; without a reward and a judge, `responder` itself judges.

    A model gets the rubric about principles, unless the file `rubric` replaces it. See
    `open_judge` for the arguments.

    Raises:
        ConfigError: both are given, or the function or the rubric is not valid.
        ModelError: the model cannot be read.
    """
    check_principle_judge(reward, judge, rubric)
    if reward is not None or judge is not None:
        return open_judge(reward, judge, rubric, connection, default=principle_rubric())
    text = principle_rubric() if rubric is None else read_rubric(Path(rubric))
    assert responder is not None
    source = responder.provenance
    return make_model_judge(str(source.get("run") or source["model"]), responder, text)


def judge_drawn(judge: Judge, draw: PrincipleDraw) -> Judge:
    """Return the judge, which compares answers by the drawn principles if it is a model."""
    return judge.with_values(draw.rubric_values) if isinstance(judge, ModelJudge) else judge
