"""How a model is run in training and in scoring: one switch each for all that saves and hastens."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import mlx.nn as nn

from mlx_dpo.models.device import on_cpu
from mlx_dpo.scoring.kernels.attention import use_chunked_attention
from mlx_dpo.scoring.kernels.gradient_checkpointing import gradient_checkpointing
from mlx_dpo.scoring.kernels.swiglu import use_fast_swiglu
from mlx_dpo.scoring.packing import use_packed_positions


@contextmanager
def memory_efficient_training(policy: nn.Module, *, recompute: bool) -> Iterator[None]:
    """With gradients: attention without an array of T x T, and, if wanted, blocks that keep
    their input alone. Holds until the gradients are built, for blocks may run again for them.
    """
    blocks = gradient_checkpointing(policy) if recompute else nullcontext()
    with use_chunked_attention(), use_packed_positions(), use_fast_swiglu(policy), blocks:
        yield


@contextmanager
def fast_inference(model: nn.Module) -> Iterator[None]:
    """On the CPU attention in chunks is quicker forward, too; a GPU has a kernel of its own."""
    attention = use_chunked_attention() if on_cpu() else nullcontext()
    with attention, use_fast_swiglu(model):
        yield
