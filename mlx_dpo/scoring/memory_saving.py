"""How a model is run in training and in scoring: one switch each for all that saves and hastens."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import mlx.nn as nn

from mlx_dpo.models.device import on_cpu
from mlx_dpo.scoring.kernels.attention import chunked_attention
from mlx_dpo.scoring.kernels.gradient_checkpointing import recomputed
from mlx_dpo.scoring.kernels.swiglu import quick_gates
from mlx_dpo.scoring.packing import tree_positions


@contextmanager
def sparing_memory(policy: nn.Module, *, recompute: bool) -> Iterator[None]:
    """With gradients: attention without an array of T x T, and, if wanted, blocks that keep
    their input alone. Holds until the gradients are built, for blocks may run again for them.
    """
    blocks = recomputed(policy) if recompute else nullcontext()
    with chunked_attention(), tree_positions(), quick_gates(policy), blocks:
        yield


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """On the CPU attention in chunks is quicker forward, too; a GPU has a kernel of its own."""
    attention = chunked_attention() if on_cpu() else nullcontext()
    with attention, quick_gates(model):
        yield
