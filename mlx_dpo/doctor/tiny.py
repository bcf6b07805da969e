"""What the self-test asks about: a tiny random Llama with adapters, and pairs for it."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import llama

from mlx_dpo.policy import adapters
from mlx_dpo.policy.device import cast
from mlx_dpo.types import TokenizedPair

# Heads of 64: the size for which GPUs have a fused attention kernel.
ARGS = llama.ModelArgs(
    model_type="llama",
    hidden_size=128,
    num_hidden_layers=2,
    intermediate_size=192,
    num_attention_heads=2,
    num_key_value_heads=1,
    rms_norm_eps=1e-5,
    vocab_size=96,
    rope_theta=10_000,
    tie_word_embeddings=False,
)
PAIRS = tuple(
    TokenizedPair(
        prompt=tuple(range(1, 3 + length)),
        chosen=tuple(range(40, 42 + 3 * length)),
        rejected=tuple(range(60, 69 + length)),
    )
    for length in (1, 5)
)
# Kernels go through a row in blocks of 32 to 128 positions: this one needs a second block of
# each. Few tokens are scored, so that errors of either sign do not cancel.
LONG = (
    TokenizedPair(
        prompt=tuple(7 * position % 96 for position in range(130)), chosen=(40, 47), rejected=(60,)
    ),
)
RANK, SCALE = 4, 2.0
GROUP_SIZE = 32


def tiny_policy(
    *, bits: int | None = None, dtype: mx.Dtype = mx.float32, fresh: bool = False
) -> nn.Module:
    """The policy under test, the same at every call; unless `fresh`, its adapters do something.

    Weights and adapters are numbers of type `dtype`; quantised ones stay packed, on the CPU too.
    """
    mx.random.seed(0)
    model = llama.Model(ARGS)
    if bits is not None:
        nn.quantize(model, group_size=GROUP_SIZE, bits=bits)
    cast(model, dtype)
    adapters.attach(model, rank=RANK, scale=SCALE, seed=1)
    if not fresh:
        rng = np.random.default_rng(2)
        weights = adapters.adapter_weights(model)
        drawn = {name: rng.normal(0, 0.1, value.shape) for name, value in weights.items()}
        # Adapters are held in float32, but computed with in `dtype`.
        rounded = [(k, mx.array(v, dtype).astype(mx.float32)) for k, v in drawn.items()]
        model.load_weights(rounded, strict=False)
    mx.eval(model.parameters())
    return model
