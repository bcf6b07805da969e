"""The learning rate that a run gets if its settings give none.

AdamW moves each weight by about the learning rate per step, whatever the size of the gradient. How
far a run goes from the reference therefore depends on rate and number of steps, on the width over
which the changes of a layer add up, on the scale of the adapters, and on the number of tokens over
which the log-ratios of a completion add up; see `choose_learning_rate`.

Sources:
    LoRA: Zephyr-7B with QLoRA (alignment handbook), 5e-6 with alpha 128 in 478 steps at width
        4096, which is 2e-5 with alpha 32; NeuralHermes-7B, 5e-5 with alpha 16 in 200 steps.
    Full fine-tuning: 5e-7 (Zephyr-7B, Tülu 3), TRL's default 1e-6; TRL advises ten times as
        much for LoRA.
    Schulman et al. 2025, LoRA Without Regret: the best rate of LoRA is ten times that of full
        fine-tuning, and independent of the rank if adapters are scaled by alpha / rank. Its fits
        to the width have the exponents -0.78 (Llama) and -0.08 (Qwen).
    Instruction tuning: TRL's examples take 2e-4 for LoRA and 2e-5, its default, for full
        fine-tuning. Its loss is a mean over tokens, so that their number does not matter.
    scripts/bench/bench_learning_rate.py; measurements in docs/notes.md.
"""

import math
from typing import NamedTuple

SUPERVISED_RATE = 2e-4  # instruction tuning with LoRA, at WIDTH and ALPHA
LORA_RATE = 2e-5  # with the following values, at which the published rates were used
WIDTH, ALPHA, STEPS, TOKENS = 4096, 32.0, 478, 256
FULL_SHARE = 0.1  # full fine-tuning takes so much of the rate of LoRA
FEWEST_STEPS, FEWEST_TOKENS = 10, 8  # less does not make the rate larger
SIGNIFICANT_DIGITS = 2


class RateFactors(NamedTuple):
    """What the default learning rate of a run depends on."""

    width: int | None  # of the hidden states; None if it is unknown
    alpha: float | None  # scale times rank of the adapters; None in full fine-tuning
    steps: int  # optimizer steps of the run
    tokens: float  # mean length of the chosen completions


def choose_learning_rate(run: RateFactors, *, factor: float = 1.0) -> float:
    """Return the default peak learning rate of a run.

    It is 2e-5 for LoRA with alpha 32 on a model of width 4096, in 478 steps on completions of 256
    tokens, and a tenth of that for full fine-tuning. It is proportional to 1 / alpha, and to one
    over the square root of width, steps and tokens. Runs of less than 10 steps count as 10 steps,
    completions of less than 8 tokens as 8 tokens.

    Args:
        run: what the rate depends on.
        factor: what the optimizer multiplies the rate by.
    """
    share = WIDTH / (run.width or WIDTH)
    share *= STEPS / max(run.steps, FEWEST_STEPS) * TOKENS / max(run.tokens, FEWEST_TOKENS)
    scale = FULL_SHARE if run.alpha is None else ALPHA / run.alpha
    return float(f"{LORA_RATE * factor * scale * math.sqrt(share):.{SIGNIFICANT_DIGITS}g}")


def choose_supervised_rate(run: RateFactors, *, factor: float = 1.0) -> float:
    """Return the default peak learning rate of instruction tuning.

    It is 2e-4 for LoRA with alpha 32 on a model of width 4096, and a tenth of that for full
    fine-tuning. It is proportional to 1 / alpha, and to one over the square root of the width. The
    numbers of steps and tokens do not matter.

    The arguments are those of `choose_learning_rate`.
    """
    scale = FULL_SHARE if run.alpha is None else ALPHA / run.alpha
    share = math.sqrt(WIDTH / (run.width or WIDTH))
    return float(f"{SUPERVISED_RATE * factor * scale * share:.{SIGNIFICANT_DIGITS}g}")
