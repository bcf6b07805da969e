"""Layers with an adapter beside them, under mlx-lm's names for their arrays.

Adapters stay float32, whatever the base is: bfloat16 would swallow updates a thousandth of a
weight's size. Their products are taken in the number type of the activations, which float32
factors would otherwise promote. Knows layers; nothing of models or files.
"""

from typing import Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner import lora

from mlx_dpo.errors import ConfigError, ModelError
from mlx_dpo.models.device import float32_weight


def add_low_rank(y: mx.array, x: mx.array, a: mx.array, b: mx.array, scale: float) -> mx.array:
    """y + scale (x A) B. (..., out), (..., in), (in, r), (r, out) -> (..., out)

    All of one number type, in which the products are taken.
    """
    thin = mx.stop_gradient(x) @ mx.stop_gradient(a)  # outside, so that it is kept

    @mx.custom_function
    def add(y: mx.array, x: mx.array, a: mx.array, b: mx.array, thin: mx.array) -> mx.array:
        return mx.addmm(y, thin, b, alpha=scale)

    @add.vjp
    def add_vjp(primals: Any, cotangent: mx.array, output: mx.array) -> list[mx.array]:
        _, x, a, b, thin = primals
        out = cotangent.flatten(0, -2)  # (n, out), as all below
        back = scale * (out @ b.T)  # (n, r)
        return [
            cotangent,
            (back @ a.T).reshape(x.shape),
            x.flatten(0, -2).T @ back,
            scale * (thin.flatten(0, -2).T @ out),
            mx.zeros_like(thin),
        ]

    return cast(mx.array, add(y, x, a, b, thin))


AdapterType = Literal["lora", "dora"]
LINEAR_TYPES = (nn.Linear, nn.QuantizedLinear)
EXPERT_TYPES = (SwitchLinear, QuantizedSwitchLinear)
EMBEDDING_TYPES = (nn.Embedding, nn.QuantizedEmbedding)


class LoRALinear(lora.LoRALinear):
    """A linear layer with an adapter (arXiv:2106.09685)."""

    def __call__(self, x: mx.array) -> mx.array:
        """x W + scale (dropout(x) A) B. (..., in) -> (..., out)"""
        a, b = self.lora_a.astype(x.dtype), self.lora_b.astype(x.dtype)
        return add_low_rank(self.linear(x), self.dropout(x), a, b, self.scale)


class LoRASwitchLinear(lora.LoRASwitchLinear):
    """The linear layers of a block's experts, each with an adapter of its own."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """As a linear layer, for the expert that `indices` names. (..., in) -> (..., out)"""
        z = self.dropout(x)
        for factor in (self.lora_a, self.lora_b):
            z = mx.gather_mm(
                z,
                factor.astype(x.dtype).swapaxes(-1, -2),
                rhs_indices=indices,
                sorted_indices=sorted_indices,
            )
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        return y + (self.scale * z).astype(x.dtype)


class LoRAEmbedding(lora.LoRAEmbedding):
    """A table of embeddings with an adapter; as the head that it is tied to, with the same one."""

    def __call__(self, ids: mx.array) -> mx.array:
        """E[ids] + scale A[ids] B. (...) -> (..., D)"""
        y = self.embedding(ids)
        z = self.lora_a[ids].astype(y.dtype) @ self.lora_b.astype(y.dtype)
        return y + (self.scale * self.dropout(z)).astype(y.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """x (E + scale A B)^T. (..., D) -> (..., V)"""
        a, b = self.lora_a.astype(x.dtype), self.lora_b.astype(x.dtype)
        return add_low_rank(self.embedding.as_linear(x), self.dropout(x), b.T, a.T, self.scale)


class DoRALinear(LoRALinear):
    """A linear layer with an adapter and a magnitude m for each output.

        y = m / ||W + scale A B|| (x W + scale (x A) B) + bias

    The norm, over a row's inputs, counts as a constant for the gradient.

    Sources:
        arXiv:2402.09353, Eq. 5 and 11.
    """

    def measure(self) -> None:
        """Set the magnitudes to those of the base, under which nothing changes."""
        self._squares = _row_squares(self.linear)  # underlined: neither trained nor saved
        self.m = mx.sqrt(self._squares)

    def __call__(self, x: mx.array) -> mx.array:
        """As above. (..., in) -> (..., out)"""
        whole = super().__call__(x)
        biased = "bias" in self.linear
        directed = whole - self.linear.bias if biased else whole
        return whole + _magnitude_factor(self.m, self._norms()).astype(x.dtype) * directed

    def _norms(self) -> mx.array:
        """Length of each row of the adapted weight. (out,) float32"""
        a, rows = mx.stop_gradient(self.lora_a), mx.stop_gradient(self.lora_b).T
        return _row_norms(self._squares, _weight_times(self.linear, a), rows, a.T @ a, self.scale)


class DoRAEmbedding(LoRAEmbedding):
    """A table of embeddings with an adapter and a magnitude for each entry, as DoRALinear."""

    def measure(self) -> None:
        """Set the magnitudes to those of the base, under which nothing changes."""
        self._squares = _row_squares(self.embedding)
        self.m = mx.sqrt(self._squares)

    def __call__(self, ids: mx.array) -> mx.array:
        """Rows of the adapted table. (...) -> (..., D)"""
        out = super().__call__(ids)
        b = mx.stop_gradient(self.lora_b)
        rows = mx.stop_gradient(self.lora_a[ids])
        crossed = self.embedding(ids).astype(mx.float32) @ b.T
        norms = _row_norms(self._squares[ids], crossed, rows, b @ b.T, self.scale)
        return out + _magnitude_factor(self.m[ids], norms)[..., None].astype(out.dtype) * out

    def as_linear(self, x: mx.array) -> mx.array:
        """Products with the rows of the adapted table. (..., D) -> (..., V)"""
        out = super().as_linear(x)
        b, rows = mx.stop_gradient(self.lora_b), mx.stop_gradient(self.lora_a)
        crossed = _weight_times(self.embedding, b.T)
        norms = _row_norms(self._squares, crossed, rows, b @ b.T, self.scale)
        return out + _magnitude_factor(self.m, norms).astype(out.dtype) * out


ADAPTER_TYPES = (LoRALinear, LoRASwitchLinear, LoRAEmbedding)  # DoRA's are among them
DORA_TYPES = (DoRALinear, DoRAEmbedding)


def _magnitude_factor(magnitude: mx.array, norms: mx.array) -> mx.array:
    """magnitude / norm - 1: near one, 16 bits would swallow what a magnitude learns. (n,)"""
    # A row of zeros has no direction to be stretched in.
    tiny = mx.finfo(mx.float32).smallest_normal
    return mx.where(norms > 0, magnitude / mx.maximum(norms, tiny) - 1, 0.0)


def _row_norms(
    squares: mx.array, crossed: mx.array, rows: mx.array, gram: mx.array, scale: float
) -> mx.array:
    """||W + scale U V|| of each row, without forming it. (..., n) float32

    ||w + s u V||^2 = ||w||^2 + 2 s (w V^T) u + s^2 u (V V^T) u: the work of r tokens through the
    layer, where unpacking it would be that of all its weights.

    Args:
        squares: Squared lengths of W's rows. (..., n)
        crossed: W V^T. (..., n, r)
        rows: U. (..., n, r)
        gram: V V^T. (r, r)
        scale: Of the adapter.
    """
    added = 2 * scale * (crossed * rows).sum(-1) + scale**2 * ((rows @ gram) * rows).sum(-1)
    return mx.sqrt(mx.maximum(squares + added, 0))


def _row_squares(base: nn.Module) -> mx.array:
    """Squared length of each row of the weight. (n,) float32"""
    return mx.square(float32_weight(base)).sum(-1)


def _weight_times(base: nn.Module, columns: mx.array) -> mx.array:
    """W V^T, in float32. (in, r) -> (n, r)"""
    if "scales" not in base:
        return base.weight.astype(mx.float32) @ columns
    return mx.quantized_matmul(
        columns.T,
        base["weight"],
        scales=base["scales"],
        biases=base.get("biases"),
        transpose=True,
        group_size=base.group_size,
        bits=base.bits,
        mode=base.mode,
    ).T


def add_adapter(
    base: nn.Module, name: str, *, kind: AdapterType, rank: int, scale: float, dropout: float
) -> nn.Module:
    """`base` with a fresh adapter, which changes nothing yet. `name` is for messages.

    Raises:
        ModelError: no adapter is known for this kind of layer.
        ConfigError: DoRA is asked for where mlx-lm has none.
    """
    sizes = {"r": rank, "scale": scale, "dropout": dropout}
    adapted: nn.Module
    # The constructors make a dense layer first; lazily, so that it is never allocated.
    if type(base) in LINEAR_TYPES:
        linear = LoRALinear if kind == "lora" else DoRALinear
        adapted = linear(_input_size(base), base.weight.shape[0], **sizes)
        adapted.linear = base
    elif type(base) in EXPERT_TYPES:
        if kind == "dora":
            raise ConfigError(
                f"fine_tune_type `dora`: `{name}` holds experts, for which neither mlx-lm nor "
                "PEFT has DoRA; use `lora`, or name other layers in `lora_target_modules`"
            )
        adapted = LoRASwitchLinear(base.input_dims, base.output_dims, base.num_experts, **sizes)
        adapted.linear = base
    elif type(base) in EMBEDDING_TYPES:
        table = LoRAEmbedding if kind == "lora" else DoRAEmbedding
        adapted = table(base.weight.shape[0], _input_size(base), **sizes)
        adapted.embedding = base
    else:
        raise ModelError(f"`{name}`: no adapter is known for a layer of type "
                         f"`{type(base).__name__}`")  # fmt: skip
    if isinstance(adapted, DORA_TYPES):
        adapted.measure()
    return adapted


def base_layer(adapted: nn.Module) -> nn.Module:
    """The layer of the base that an adapter is beside."""
    base: nn.Module = adapted["embedding" if isinstance(adapted, LoRAEmbedding) else "linear"]
    return base


def adapter_rank(adapted: nn.Module) -> int:
    """Rank of an adapter."""
    rank: int = adapted.lora_a.shape[-2 if isinstance(adapted, LoRASwitchLinear) else -1]
    return rank


def adapter_dropout(adapted: nn.Module) -> float:
    """Dropout on an adapter's input."""
    return round(1 - float(adapted.dropout._p_1), 12)  # MLX keeps its complement alone


def _input_size(base: nn.Module) -> int:
    """Width of a row of the weight, packed or not."""
    width: int = base.weight.shape[-1]
    return width * 32 // base.bits if "scales" in base else width
