"""Kernels of a training pass, counted on its graph, which is built as for a GPU and never run.

On the CPU backend MLX replaces its fused functions by their formulas while it builds a graph. Here
they are replaced by stand-ins of as many nodes as the functions have kernels on Metal, and our code
finds Metal as the device. A node that only gives another shape to an array is no kernel.
"""

import io
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_dpo.adapters import attach as adapters
from mlx_dpo.io.arrays import named_arrays
from mlx_dpo.losses.log_ratios import log_ratio_margin
from mlx_dpo.losses.pairwise import sigmoid_loss
from mlx_dpo.models.empty_weights import build_model
from mlx_dpo.models.restore import patched
from mlx_dpo.optim.grouped_update import GroupedUpdate
from mlx_dpo.optim.optimizers import build_optimizer
from mlx_dpo.profiling.bench.shapes import Shape
from mlx_dpo.scoring.kernels import attention, attention_dispatch
from mlx_dpo.scoring.kernels.attention import AttentionInputs, AttentionOptions
from mlx_dpo.scoring.scorers import Packing, make_shared_scorer, memory_efficient_training
from mlx_dpo.types import PairLogps, TokenizedPair
from scripts.bench.steps import BETA, RANK, SCALE

# Primitives that share the memory of their input. `Reshape`, `Flatten` and `Unflatten` copy an
# input that is not contiguous, which the graph does not show.
VIEWS = {
    *("AsStrided", "Broadcast", "Copy", "CustomTransforms", "Depends", "ExpandDims", "Flatten"),
    *("Reshape", "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten"),
}


class PassKernels(NamedTuple):
    """Kernels of a pass, and entries of the score matrices that each head of a layer computes."""

    kernels: int
    per_layer: int
    scores: int


def pass_kernels(
    shape: Shape, pairs: Sequence[TokenizedPair], *, dtype: mx.Dtype, packing: Packing
) -> PassKernels:
    """Count the kernels of a training pass with a model of this shape.

    Layers have the same number of kernels, so models of two and of three layers are counted.
    """
    with recorded_scores() as scores:
        two, three = (
            count_kernels(training_graph(weightless_model(shape, layers, dtype), pairs, packing))
            for layers in (2, 3)
        )
    kernels = two + (shape.num_hidden_layers - 2) * (three - two)
    return PassKernels(kernels, three - two, sum(scores) // 5)


def update_kernels(shape: Shape) -> int:
    """Count the kernels of clipping and AdamW for the adapters of a model of this shape.

    The update is the second one, for which the first has packed weights and state. Each gradient is
    copied into its group by a kernel of its own, though the graph has one node for all.
    """
    model = weightless_model(shape, shape.num_hidden_layers, mx.float32)
    optimizer = build_optimizer("adamw", model, 1e-3)
    update = GroupedUpdate(optimizer, model)
    kernels = 0
    for _ in range(2):
        weights = named_arrays(model.trainable_parameters())
        gradients = [(name, mx.zeros(value.shape)) for name, value in weights.items()]
        mx.eval([gradient for _, gradient in gradients])
        clipped, norm = update.clip(tree_unflatten(gradients), 1.0)
        update.apply(model, weights, clipped)
        results = named_arrays([model.trainable_parameters(), optimizer.state]).values()
        kernels = count_kernels([norm, *results]) + len(weights)
        mx.eval(list(results))
    return kernels


@contextmanager
def recorded_scores() -> Iterator[list[int]]:
    """Record the entries of the score matrix of each chunk of queries inside the block."""
    scores: list[int] = []
    original = attention.chunked_attention

    def spy(inputs: AttentionInputs, options: AttentionOptions) -> mx.array:
        scores.extend((c.query_end - c.query_start) * c.num_keys for c in options.chunks)
        return original(inputs, options)

    with patched(attention_dispatch, "chunked_attention", spy):
        yield scores


def count_kernels(arrays: Sequence[mx.array]) -> int:
    """Return the number of kernels that compute `arrays`: nodes of the graph that are no views."""
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    names = Counter(re.findall(r'label ="([^"]*)"', text.getvalue()))
    return sum(count for name, count in names.items() if name not in VIEWS)


def training_graph(model: nn.Module, pairs: Sequence[TokenizedPair], packing: Packing) -> list[Any]:
    """Return the loss and the gradients of a pass over `pairs` as on a GPU, not evaluated."""
    vocab_size = model.args.vocab_size
    score = make_shared_scorer(vocab_size=vocab_size, gradients=True, packing=packing)
    zeros = PairLogps(mx.zeros(len(pairs)), mx.zeros(len(pairs)))

    def loss(policy: nn.Module) -> mx.array:
        margin = log_ratio_margin(score(policy, pairs), zeros)
        return sigmoid_loss(margin, beta=BETA, label_smoothing=0.0).mean()

    with metal_graph(), memory_efficient_training(model, recompute=False):
        value, gradients = nn.value_and_grad(model, loss)(model)
    return [value, *(array for _, array in tree_flatten(gradients))]


def weightless_model(shape: Shape, layers: int, dtype: mx.Dtype) -> nn.Module:
    """Return a model of this shape with so many layers and rank-8 adapters.

    Every weight is a view of one number, so that the model takes no memory and no kernel.
    """
    model = build_model(shape.config() | {"num_hidden_layers": layers})
    adapters.attach_adapters(model, rank=RANK, scale=SCALE)
    trained = named_arrays(model.trainable_parameters())
    weights = [
        (name, mx.broadcast_to(mx.zeros((), mx.float32 if name in trained else dtype), value.shape))
        for name, value in named_arrays(model.parameters()).items()
    ]
    mx.eval([weight for _, weight in weights])
    model.update(tree_unflatten(weights))
    return model


@contextmanager
def metal_graph() -> Iterator[None]:
    """Build graphs as on Metal inside the block; they cannot be evaluated."""
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("mlx_dpo.") and hasattr(module, "is_cpu"):
                stack.enter_context(patched(module, "is_cpu", lambda: False))
            if name.startswith("mlx_dpo.") and hasattr(module, "device_kind"):
                stack.enter_context(patched(module, "device_kind", lambda: "metal"))
        for name, function in STAND_INS.items():
            stack.enter_context(patched(mx.fast, name, function))
        yield


@mx.custom_function
def _norm(x: mx.array, weight: mx.array) -> mx.array:
    return mx.maximum(x, weight)


@_norm.vjp
def _norm_vjp(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
    x, weight = primals  # the gradient of a frozen weight is not computed
    return mx.minimum(cotangent, x), mx.maximum(cotangent, weight)


@mx.custom_function
def _rope(x: mx.array) -> mx.array:
    return mx.abs(x)


@_rope.vjp
def _rope_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return mx.abs(cotangent)


def _attention(q: mx.array, k: mx.array, v: mx.array, *, mask: Any, **more: Any) -> mx.array:
    """Stand in for the fused attention kernel, which is never differentiated."""
    arrays = [k, v, *([mask] if isinstance(mask, mx.array) else [])]
    [waiting] = mx.depends([q], arrays)
    result = mx.abs(waiting)
    if more.get("force_fused"):
        return result
    # MLX takes five kernels for the formula: scale, product, mask, softmax, product.
    for _ in range(4):
        result = mx.abs(result)
    return result


@mx.custom_function
def _cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    return mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1).astype(mx.float32)


@_cross_entropy.vjp
def _cross_entropy_vjp(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
    logits, targets = primals
    return mx.minimum(logits, cotangent[..., None].astype(logits.dtype)), mx.zeros_like(targets)


STAND_INS = {
    "rms_norm": lambda x, weight, eps: _norm(x, weight),
    "rope": lambda x, dims, **options: _rope(x),
    "scaled_dot_product_attention": _attention,
    "cross_entropy": _cross_entropy,
}
