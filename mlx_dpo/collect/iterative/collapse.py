"""Measures that show whether a loop exploits its reward.

A reward function without a bound, or a judge, can prefer text that no person wants. Win rates
then rise while the answers repeat themselves, run to the limit or leave the base. These measures
do not depend on the reward; `training.monitor.samples.find_collapse` judges them.
"""

from collections.abc import Sequence

from mlx_dpo.data.prompts import Prompt
from mlx_dpo.generation.batch import GeneratedText
from mlx_dpo.generation.prompt import encode_prompt
from mlx_dpo.saved_runs.respond import ModelResponder
from mlx_dpo.training.monitor.samples import estimate_kl, measure_answers

MAX_SCORED = 64  # answers by which the KL divergence is estimated


def measure_health(
    policy: ModelResponder,
    prompts: Sequence[Prompt],
    replies: Sequence[GeneratedText],
    *,
    has_base: bool,
) -> dict[str, float]:
    """Return length, share of cut answers, repetition and KL divergence of a policy's answers.

    Args:
        has_base: whether the policy without its adapters is the base model. Otherwise there is no
            KL divergence.
    """
    tokenizer = policy.base.tokenizer
    answers = [reply.answer for reply in replies]
    kl = None
    if has_base:
        rows = [
            encode_prompt(tokenizer, prompt.messages, thinking=policy.thinking)
            for prompt in prompts[:MAX_SCORED]
        ]
        kl = estimate_kl(policy.base.model, rows, answers[:MAX_SCORED])
    return measure_answers(answers, kl).to_row()
