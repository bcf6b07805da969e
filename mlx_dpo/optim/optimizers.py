"""Optimizers by name: those of MLX and `Muon`, set up as in their papers and in PyTorch.

Settings have the names of Transformers. An optimizer takes the settings that its entry in
`OPTIMIZERS` lists, as keyword arguments; None is never passed.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlx_dpo.io.arrays import named_arrays

ADAMW_UPDATE_RMS = 0.2  # typical root mean square of AdamW's update, at learning rate 1
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPSILON = 1e-7


class Muon(optim.Optimizer):
    """The Muon optimizer: momentum with an orthogonalized update of matrices (last two axes).

        v <- mu v + (1 - mu) g,   u = (1 - mu) g + mu v
        w <- w - lr (decay w + 0.2 sqrt(max(rows, columns)) orthogonalize(u))

    The factor gives the update the root mean square that AdamW's has in long runs, so that the
    same learning rate suits both. MLX's own Muon differs in three ways: its factor depends on
    which axis of a matrix is the output, and adapters store the axes in the opposite order; it
    adds weight decay to the gradient, where the decay outweighs a small gradient; and it
    reshapes a stack of matrices into a single matrix.

    Sources:
        Jordan et al. 2024, kellerjordan.github.io/posts/muon; factor and decay: Liu et al.
        2025, arXiv:2502.16982, Eq. 4; as torch.optim.Muon with adjust_lr_fn "match_rms_adamw".
    """

    def __init__(self, learning_rate: float, *, momentum: float, weight_decay: float) -> None:
        """Set the hyper-parameters; the method `init` creates the momentum buffers."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._maybe_schedule("learning_rate", learning_rate)
        self.momentum, self.weight_decay = momentum, weight_decay

    def init_single(self, parameter: mx.array, state: dict[str, mx.array]) -> None:
        """Set the momentum buffer of the parameter to zeros."""
        state["v"] = mx.zeros_like(parameter)

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]
    ) -> mx.array:
        """Return the parameter after one step, and update its momentum buffer in `state`."""
        state["v"] = self.momentum * state["v"] + (1 - self.momentum) * gradient
        update = (1 - self.momentum) * gradient + self.momentum * state["v"]
        learning_rate = self.learning_rate.astype(parameter.dtype)
        scale = ADAMW_UPDATE_RMS * max(parameter.shape[-2:]) ** 0.5
        decayed = parameter * (1 - learning_rate * self.weight_decay)
        return decayed - learning_rate * scale * orthogonalize(update)


def orthogonalize(matrix: mx.array, steps: int = 5) -> mx.array:
    """Return approximately U V^T, where U S V^T is the SVD of the matrix. (..., m, n)

    The result is computed by `steps` Newton-Schulz iterations.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.swapaxes(-1, -2) if is_tall else matrix
    x = x / (mx.sqrt(mx.square(x).sum(axis=(-1, -2), keepdims=True)) + EPSILON)
    for _ in range(steps):
        gram = x @ x.swapaxes(-1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.swapaxes(-1, -2) if is_tall else x


def adamw(
    learning_rate: float,
    weight_decay: float = 0.0,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.999,
    adam_epsilon: float = 1e-8,
) -> optim.Optimizer:
    """Return AdamW as in PyTorch: with bias correction, which MLX leaves out by default."""
    return optim.AdamW(
        learning_rate,
        betas=[adam_beta1, adam_beta2],
        eps=adam_epsilon,
        weight_decay=weight_decay,
        bias_correction=True,
    )


def adam(
    learning_rate: float,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.999,
    adam_epsilon: float = 1e-8,
) -> optim.Optimizer:
    """Return Adam as in PyTorch: with bias correction, which MLX leaves out by default."""
    betas = [adam_beta1, adam_beta2]
    return optim.Adam(learning_rate, betas=betas, eps=adam_epsilon, bias_correction=True)


def adafactor(learning_rate: float, weight_decay: float = 0.0) -> optim.Optimizer:
    """Return Adafactor with the given learning rate, as Transformers' trainer sets it up.

    By default MLX derives the learning rate from the step number, and multiplies it by the root
    mean square of the weights, which is zero for half of the matrices of new adapters.
    """
    return optim.Adafactor(
        learning_rate, weight_decay=weight_decay, relative_step=False, scale_parameter=False
    )


def lion(
    learning_rate: float,
    weight_decay: float = 0.0,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.99,
) -> optim.Optimizer:
    """Return the Lion optimizer, by default with the betas of its paper."""
    return optim.Lion(learning_rate, betas=[adam_beta1, adam_beta2], weight_decay=weight_decay)


def muon(
    learning_rate: float, weight_decay: float = 0.0, momentum: float = 0.95
) -> optim.Optimizer:
    """Return Muon for the matrices of the layers, with AdamW for all other weights.

    Vectors (DoRA's magnitudes, norms) cannot be orthogonalized, and the paper also uses AdamW for
    embeddings and LM head.
    """
    return optim.MultiOptimizer(
        [
            Muon(learning_rate, momentum=momentum, weight_decay=weight_decay),
            adamw(learning_rate, weight_decay),
        ],
        [_is_matrix_of_a_layer],
    )


def _is_matrix_of_a_layer(path: str, value: mx.array) -> bool:
    # Layers are elements of a list, whatever the architecture calls the list: `layers.0.…`.
    return value.ndim > 1 and any(part.isdigit() for part in path.split("."))


def sgd(learning_rate: float, weight_decay: float = 0.0, momentum: float = 0.0) -> optim.Optimizer:
    """Return stochastic gradient descent as in PyTorch."""
    return optim.SGD(learning_rate, momentum=momentum, weight_decay=weight_decay)


def rmsprop(learning_rate: float) -> optim.Optimizer:
    """Return RMSprop as in PyTorch, the optimizer of the DPO paper."""
    return optim.RMSprop(learning_rate)


class OptimizerEntry(NamedTuple):
    """An optimizer: its display name, the function that builds it, and its settings."""

    title: str
    build: Callable[..., optim.Optimizer]  # build(learning_rate, **settings)
    settings: tuple[str, ...]
    rate_factor: float = 1.0  # its default learning rate is so many times AdamW's


OPTIMIZERS: Mapping[str, OptimizerEntry] = {
    "adamw": OptimizerEntry(
        "AdamW", adamw, ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
    ),
    "adam": OptimizerEntry("Adam", adam, ("adam_beta1", "adam_beta2", "adam_epsilon")),
    "adafactor": OptimizerEntry("Adafactor", adafactor, ("weight_decay",)),
    "lion": OptimizerEntry("Lion", lion, ("weight_decay", "adam_beta1", "adam_beta2"), 0.3),
    "muon": OptimizerEntry("Muon", muon, ("weight_decay", "momentum"), 4.0),
    "sgd": OptimizerEntry("SGD", sgd, ("weight_decay", "momentum"), 500.0),
    "rmsprop": OptimizerEntry("RMSprop", rmsprop, (), 0.5),
}


def build_optimizer(
    name: str, policy: nn.Module, learning_rate: float, **settings: float
) -> optim.Optimizer:
    """Build the optimizer called `name`, with state for the trainable weights of `policy`."""
    optimizer = OPTIMIZERS[name].build(learning_rate, **settings)
    optimizer.init(policy.trainable_parameters())
    return optimizer


def count_state_bytes(optimizer: optim.Optimizer) -> int:
    """Return the size in bytes of the optimizer's state arrays; scalars are not counted."""
    return sum(value.nbytes for value in named_arrays(optimizer.state).values() if value.ndim)
