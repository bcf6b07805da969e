"""Optimizers by name: MLX's own, with what they need to do here what their papers say.

Names of settings are those of Transformers. An optimizer's arguments are the settings it has.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlx_dpo.io.arrays import named_arrays

MATCHING_ADAM = 0.2  # typical size of an entry of AdamW's update, at learning rate 1
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
TINY = 1e-7


class Muon(optim.Optimizer):
    """Momentum whose direction is made orthogonal, for matrices. The last two axes are one.

        v <- mu v + (1 - mu) g,   u = (1 - mu) g + mu v
        w <- w - rate (decay w + 0.2 sqrt(max(rows, columns)) orthogonal(u))

    The factor gives an entry of the update the size that AdamW's has in long runs, so that one
    learning rate serves both. MLX's own differs: its factor depends on which axis of a matrix
    is the output, which adapters store the other way round; it adds weight decay to the
    gradient, where the size of a small gradient drowns in it; and it joins the axes of stacked
    matrices.

    Sources:
        Jordan et al. 2024, kellerjordan.github.io/posts/muon; factor and decay: Liu et al.
        2025, arXiv:2502.16982, Eq. 4; as torch.optim.Muon with adjust_lr_fn "match_rms_adamw".
    """

    def __init__(self, learning_rate: float, *, momentum: float, weight_decay: float) -> None:
        """Begin with no momentum."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._maybe_schedule("learning_rate", learning_rate)
        self.momentum, self.weight_decay = momentum, weight_decay

    def init_single(self, parameter: mx.array, state: dict[str, mx.array]) -> None:
        """Zeros as large as the matrix."""
        state["v"] = mx.zeros_like(parameter)

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]
    ) -> mx.array:
        """The matrix after the update."""
        state["v"] = self.momentum * state["v"] + (1 - self.momentum) * gradient
        update = (1 - self.momentum) * gradient + self.momentum * state["v"]
        rate = self.learning_rate.astype(parameter.dtype)
        size = MATCHING_ADAM * max(parameter.shape[-2:]) ** 0.5
        kept = parameter * (1 - rate * self.weight_decay)
        return kept - rate * size * orthogonal(update)


def orthogonal(matrix: mx.array, steps: int = 5) -> mx.array:
    """Nearly U V^T of the singular value decomposition, by Newton-Schulz steps. (..., m, n)"""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.swapaxes(-1, -2) if tall else matrix
    x = x / (mx.sqrt(mx.square(x).sum(axis=(-1, -2), keepdims=True)) + TINY)
    for _ in range(steps):
        gram = x @ x.swapaxes(-1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.swapaxes(-1, -2) if tall else x


def adamw(
    rate: float,
    weight_decay: float = 0.0,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.999,
    adam_epsilon: float = 1e-8,
) -> optim.Optimizer:
    """AdamW as in PyTorch: with bias correction, which MLX leaves out unless asked."""
    return optim.AdamW(
        rate,
        betas=[adam_beta1, adam_beta2],
        eps=adam_epsilon,
        weight_decay=weight_decay,
        bias_correction=True,
    )


def adam(
    rate: float, adam_beta1: float = 0.9, adam_beta2: float = 0.999, adam_epsilon: float = 1e-8
) -> optim.Optimizer:
    """Adam as in PyTorch, likewise."""
    return optim.Adam(rate, betas=[adam_beta1, adam_beta2], eps=adam_epsilon, bias_correction=True)


def adafactor(rate: float, weight_decay: float = 0.0) -> optim.Optimizer:
    """Adafactor with the given rate, as Transformers' trainer sets it up.

    MLX would put a rate of its own in its place, and scale it by the size of the weights,
    which is zero for half of a fresh adapter.
    """
    return optim.Adafactor(
        rate, weight_decay=weight_decay, relative_step=False, scale_parameter=False
    )


def lion(
    rate: float, weight_decay: float = 0.0, adam_beta1: float = 0.9, adam_beta2: float = 0.99
) -> optim.Optimizer:
    """Lion, with the paper's betas unless they are set."""
    return optim.Lion(rate, betas=[adam_beta1, adam_beta2], weight_decay=weight_decay)


def muon(rate: float, weight_decay: float = 0.0, momentum: float = 0.95) -> optim.Optimizer:
    """Muon for matrices within the blocks; what is none, or lies outside, is AdamW's.

    Vectors (DoRA's magnitudes, norms) have no direction to make orthogonal, and embeddings
    and head are AdamW's in the paper too.
    """
    return optim.MultiOptimizer(
        [Muon(rate, momentum=momentum, weight_decay=weight_decay), adamw(rate, weight_decay)],
        [_is_matrix_of_a_block],
    )


def _is_matrix_of_a_block(path: str, value: mx.array) -> bool:
    # A block is an element of a list of layers, whatever the architecture calls the list.
    return value.ndim > 1 and any(part.isdigit() for part in path.split("."))


def sgd(rate: float, weight_decay: float = 0.0, momentum: float = 0.0) -> optim.Optimizer:
    """Plain gradient descent as in PyTorch."""
    return optim.SGD(rate, momentum=momentum, weight_decay=weight_decay)


def rmsprop(rate: float) -> optim.Optimizer:
    """RMSprop as in PyTorch; what the DPO paper used."""
    return optim.RMSprop(rate)


BY_NAME: dict[str, Callable[..., optim.Optimizer]] = {
    "adamw": adamw,
    "adam": adam,
    "adafactor": adafactor,
    "lion": lion,
    "muon": muon,
    "sgd": sgd,
    "rmsprop": rmsprop,
}


def make(name: str, policy: nn.Module, rate: float, **settings: Any) -> optim.Optimizer:
    """The optimizer of that name, ready for what `policy` trains."""
    optimizer = BY_NAME[name](rate, **settings)
    optimizer.init(policy.trainable_parameters())
    return optimizer


def state_bytes(optimizer: optim.Optimizer) -> int:
    """What it remembers of the gradients before; its step and its rate are next to nothing."""
    return sum(value.nbytes for value in named_arrays(optimizer.state).values() if value.ndim)
