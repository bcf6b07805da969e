"""How far a converted model is from its source: log-probabilities of the same text.

The text is fixed, so that numbers can be laid beside each other.
"""

import mlx.core as mx

from mlx_dpo.arrays import scalar
from mlx_dpo.errors import ModelError
from mlx_dpo.policy.load import Base

TEXT = (
    "Every morning the old ferry left the harbour at seven, and a small boy stood on the pier "
    "and waved. The captain once asked the baker about him. He waves because the boat always "
    "comes back, the baker said. After that, the captain waved too."
)

# Nats per token. The same number type must give the same numbers; a narrower one rounds
# every weight, to 11 bits (float16) or 8 (bfloat16): small models here move by a thousandth
# and a hundredth, eight layers of random weights by ten times as much.
SAME = 1e-4
ROUNDED = {"float32": SAME, "float16": 0.05, "bfloat16": 0.3}
LARGE = 0.5  # a quantised model this far off writes visibly worse


def sample_ids(base: Base) -> mx.array:
    """The text as token ids, cut to ids that the model has. (1, T) int32"""
    ids = base.tokenizer.encode(TEXT)
    return mx.array([[min(i, base.vocab_size - 1) for i in ids]], dtype=mx.int32)


def mean_difference(source: mx.array, converted: mx.array) -> float:
    """Mean absolute difference of two sets of token log-probabilities, in nats.

    Raises:
        ModelError: a log-probability is not a number.
    """
    for name, logps in (("the source", source), ("the converted model", converted)):
        if not scalar(mx.isfinite(logps).all()):
            raise ModelError(
                f"{name} gives log-probabilities that are not numbers; "
                "its weights are broken or out of range for `dtype`"
            )
    return scalar(mx.abs(source - converted).mean())


def tolerance(source: str, converted: str) -> float:
    """How far two models may be apart that differ in the number type of their weights alone."""
    return SAME if source == converted else max(ROUNDED[source], ROUNDED[converted])
