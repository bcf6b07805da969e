"""What a backward pass keeps, made less: one switch for both ways."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import mlx.nn as nn

from mlx_dpo.policy.attention import chunked_attention
from mlx_dpo.policy.recompute import recomputed


@contextmanager
def sparing_memory(policy: nn.Module, *, recompute: bool) -> Iterator[None]:
    """Attention without an array of T x T, and, if wanted, blocks that keep their input alone."""
    with chunked_attention(), recomputed(policy) if recompute else nullcontext():
        yield
