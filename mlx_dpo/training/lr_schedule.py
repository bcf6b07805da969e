"""The learning rate as a pure function of the step, equal to that of Transformers and TRL."""

import math


def learning_rate(
    step: int, *, peak: float, total: int, warmup: int, kind: str = "cosine", floor: float = 0.0
) -> float:
    """The rate of update `step`, counted from 0, out of `total`.

    During the first `warmup` updates the rate rises linearly from 0 (so the first of them
    changes nothing, as in Transformers); then it falls along half a cosine or a line, with
    the inverse root of the step, or stays. A cosine with a floor ends at `floor` times `peak`.

    Sources:
        transformers.optimization, get_scheduler and what it calls; all but `constant` there
        take a warm-up.
    """
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    shapes = {
        "cosine": cosine,
        "cosine_with_min_lr": cosine * (1 - floor) + floor,
        "linear": 1.0 - progress,
        # Without a warm-up Transformers counts from 10 000 steps: it hardly falls.
        "inverse_sqrt": _inverse_root(step, warmup or 10_000, began=warmup),
        "constant": 1.0,
        "constant_with_warmup": 1.0,
    }
    return peak * max(0.0, shapes[kind])


def _inverse_root(step: int, timescale: int, *, began: int) -> float:
    return 1.0 / math.sqrt((step - began + timescale) / timescale)
