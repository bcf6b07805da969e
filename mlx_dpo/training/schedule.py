"""The learning rate as a pure function of the step, equal to that of Transformers and TRL."""

import math


def learning_rate(
    step: int, *, peak: float, total: int, warmup: float, kind: str = "cosine"
) -> float:
    """The rate of update `step`, counted from 0, out of `total`.

    During the first ceil(warmup * total) updates the rate rises linearly from 0 (so the
    first of them changes nothing, as in Transformers); then it falls to 0 along half a
    cosine or a line, or stays.

    Sources:
        transformers.optimization, get_cosine_schedule_with_warmup and its siblings.
    """
    rising = math.ceil(warmup * total)
    if step < rising:
        return peak * step / rising
    progress = (step - rising) / max(1, total - rising)
    shapes = {
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        "linear": 1.0 - progress,
        "constant": 1.0,
        "constant_with_warmup": 1.0,
    }
    return peak * max(0.0, shapes[kind])
