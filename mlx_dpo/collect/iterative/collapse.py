"""Signs that a loop exploits its reward: answers that repeat, run to the limit, or leave the base.

A reward function without a bound, or a judge, can prefer text that no person wants. Win rates
then rise while the answers fall apart; these measures do not depend on the reward.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_dpo.data.prompts import Prompt
from mlx_dpo.generation.batch import GeneratedText
from mlx_dpo.generation.prompt import encode_prompt
from mlx_dpo.saved_runs.respond import ModelResponder
from mlx_dpo.training.monitor.samples import (
    CLIPPED,
    LENGTH,
    REPETITION,
    base_name,
    degenerate_answers,
    estimate_kl,
    measure_answers,
)

MAX_SCORED = 64  # answers by which the KL divergence is estimated
MORE_CLIPPED = 0.5  # share of answers at the length limit, above the base model's share


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


def find_collapse(health: Mapping[str, float], base: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a round's answers, with numbers; None if nothing is.

    Args:
        health: result of `measure_health` for the round.
        base: the same for the initial policy; empty if it was not measured.
    """
    of_base = {base_name(name): base[name] for name in (LENGTH, REPETITION) if name in base}
    faults = [fault] if (fault := degenerate_answers({**health, **of_base})) else []
    clipped, before = health[CLIPPED], base.get(CLIPPED)
    if before is not None and clipped >= before + MORE_CLIPPED:
        faults.append(f"answers run to the length limit ({clipped:.0%}, base model {before:.0%})")
    return ", and ".join(faults) or None
