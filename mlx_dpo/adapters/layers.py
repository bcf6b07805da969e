"""LoRA and DoRA layers whose parameters have mlx-lm's names.

The adapters' parameters are float32 whatever the dtype of the base, because bfloat16 rounds away
updates of a thousandth of a weight's size. They are cast to the dtype of the activations for matrix
products; otherwise the activations would be promoted to float32.
"""

from typing import Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner import lora

from mlx_dpo.errors import ConfigError, ModelError
from mlx_dpo.models.device import float32_weight


def add_low_rank(y: mx.array, x: mx.array, a: mx.array, b: mx.array, scale: float) -> mx.array:
    """Return y + scale (x A) B. (..., out), (..., in), (in, r), (r, out) -> (..., out)

    All arrays must have the same dtype; the matrix products are computed in that dtype.
    """
    # Outside of the custom function, so that the backward pass does not compute it again.
    xa = mx.stop_gradient(x) @ mx.stop_gradient(a)

    @mx.custom_function
    def add(y: mx.array, x: mx.array, a: mx.array, b: mx.array, xa: mx.array) -> mx.array:
        return mx.addmm(y, xa, b, alpha=scale)

    @add.vjp
    def add_vjp(primals: Any, cotangent: mx.array, output: mx.array) -> list[mx.array]:
        _, x, a, b, xa = primals
        grad_y = cotangent.flatten(0, -2)  # (n, out)
        grad_xa = scale * (grad_y @ b.T)  # (n, r)
        return [
            cotangent,
            (grad_xa @ a.T).reshape(x.shape),
            x.flatten(0, -2).T @ grad_xa,
            scale * (xa.flatten(0, -2).T @ grad_y),
            mx.zeros_like(xa),
        ]

    return cast(mx.array, add(y, x, a, b, xa))


AdapterType = Literal["lora", "dora"]
LINEAR_TYPES = (nn.Linear, nn.QuantizedLinear)
EXPERT_TYPES = (SwitchLinear, QuantizedSwitchLinear)
EMBEDDING_TYPES = (nn.Embedding, nn.QuantizedEmbedding)


class LoRALinear(lora.LoRALinear):
    """A linear layer with LoRA (arXiv:2106.09685)."""

    def __call__(self, x: mx.array) -> mx.array:
        """Return x W + scale (dropout(x) A) B for the base weight W. (..., in) -> (..., out)"""
        a, b = self.lora_a.astype(x.dtype), self.lora_b.astype(x.dtype)
        return add_low_rank(self.linear(x), self.dropout(x), a, b, self.scale)


class LoRASwitchLinear(lora.LoRASwitchLinear):
    """The linear layers of a block's experts, with separate LoRA matrices for each expert."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Apply the experts' layers with LoRA to `x`. (..., in) -> (..., out)

        `indices` contains the selected experts of each token; `sorted_indices` says whether the
        indices are sorted, which is faster.
        """
        low_rank = self.dropout(x)
        for factor in (self.lora_a, self.lora_b):
            low_rank = mx.gather_mm(
                low_rank,
                factor.astype(x.dtype).swapaxes(-1, -2),
                rhs_indices=indices,
                sorted_indices=sorted_indices,
            )
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        return y + (self.scale * low_rank).astype(x.dtype)


class LoRAEmbedding(lora.LoRAEmbedding):
    """A token embedding with LoRA; a tied LM head uses the same LoRA matrices."""

    def __call__(self, ids: mx.array) -> mx.array:
        """Return E[ids] + scale A[ids] B, where E is the base embedding. (...) -> (..., D)"""
        y = self.embedding(ids)
        low_rank = self.lora_a[ids].astype(y.dtype) @ self.lora_b.astype(y.dtype)
        return y + (self.scale * self.dropout(low_rank)).astype(y.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """Return x (E + scale A B)^T, where E is the base embedding. (..., D) -> (..., V)"""
        a, b = self.lora_a.astype(x.dtype), self.lora_b.astype(x.dtype)
        return add_low_rank(self.embedding.as_linear(x), self.dropout(x), b.T, a.T, self.scale)


class DoRALinear(LoRALinear):
    """A linear layer with DoRA: LoRA and a learned magnitude m for each output.

        y = m / ||W + scale A B|| (x W + scale (x A) B) + bias

    The norm is that of each row of the adapted weight (out, in). Gradients do not flow through
    the norm.

    Sources:
        arXiv:2402.09353, Eq. 5 and 11.
    """

    def init_magnitude(self) -> None:
        """Set the magnitudes `m` to the row norms of the base weight.

        The output of the layer does not change.
        """
        self._squares = _row_squares(self.linear)  # MLX neither trains nor saves `_` attributes
        self.m = mx.sqrt(self._squares)

    def __call__(self, x: mx.array) -> mx.array:
        """Return m / ||W + scale A B|| (x W + scale (x A) B) + bias. (..., in) -> (..., out)"""
        out = super().__call__(x)
        without_bias = out - self.linear.bias if "bias" in self.linear else out
        return out + _magnitude_factor(self.m, self._norms()).astype(x.dtype) * without_bias

    def _norms(self) -> mx.array:
        """Return the norm of each row of the adapted weight W + scale A B. (out,) float32"""
        a, rows = mx.stop_gradient(self.lora_a), mx.stop_gradient(self.lora_b).T
        return _row_norms(self._squares, _weight_times(self.linear, a), rows, a.T @ a, self.scale)


class DoRAEmbedding(LoRAEmbedding):
    """A token embedding with DoRA: LoRA and a learned magnitude for each row (token)."""

    def init_magnitude(self) -> None:
        """Set the magnitudes `m` to the row norms of the base weight.

        The output of the layer does not change.
        """
        self._squares = _row_squares(self.embedding)
        self.m = mx.sqrt(self._squares)

    def __call__(self, ids: mx.array) -> mx.array:
        """Return the rows of the adapted embedding for the token ids. (...) -> (..., D)"""
        out = super().__call__(ids)
        b = mx.stop_gradient(self.lora_b)
        rows = mx.stop_gradient(self.lora_a[ids])
        crossed = self.embedding(ids).astype(mx.float32) @ b.T
        norms = _row_norms(self._squares[ids], crossed, rows, b @ b.T, self.scale)
        return out + _magnitude_factor(self.m[ids], norms)[..., None].astype(out.dtype) * out

    def as_linear(self, x: mx.array) -> mx.array:
        """Return the product of `x` and the transposed adapted embedding. (..., D) -> (..., V)"""
        out = super().as_linear(x)
        b, rows = mx.stop_gradient(self.lora_b), mx.stop_gradient(self.lora_a)
        crossed = _weight_times(self.embedding, b.T)
        norms = _row_norms(self._squares, crossed, rows, b @ b.T, self.scale)
        return out + _magnitude_factor(self.m, norms).astype(out.dtype) * out


ADAPTER_TYPES = (LoRALinear, LoRASwitchLinear, LoRAEmbedding)  # DoRA's types are subclasses
DORA_TYPES = (DoRALinear, DoRAEmbedding)


def _magnitude_factor(magnitude: mx.array, norms: mx.array) -> mx.array:
    """Return magnitude / norm - 1 for each row; 0 if the norm is 0. (n,)

    The quotient is close to 1, where a 16-bit dtype would lose small changes; after subtracting
    1, the small changes are kept.
    """
    # A row of zeros has no direction that could be scaled.
    tiny = mx.finfo(mx.float32).smallest_normal
    return mx.where(norms > 0, magnitude / mx.maximum(norms, tiny) - 1, 0.0)


def _row_norms(
    squares: mx.array, crossed: mx.array, rows: mx.array, gram: mx.array, scale: float
) -> mx.array:
    """Return the norm of each row of W + scale U V without computing that matrix. (..., n) float32

    For a row w of W and a row u of U, the squared norm is
    ||w + s u V||^2 = ||w||^2 + 2 s (w V^T) u + s^2 u (V V^T) u. This costs as much as a forward
    pass of r tokens through the layer; dequantizing the weight would cost far more.

    Args:
        squares: Squared norms of the rows of W. (..., n)
        crossed: W V^T. (..., n, r)
        rows: U. (..., n, r)
        gram: V V^T. (r, r)
        scale: Scale of the adapter.
    """
    added = 2 * scale * (crossed * rows).sum(-1) + scale**2 * ((rows @ gram) * rows).sum(-1)
    return mx.sqrt(mx.maximum(squares + added, 0))


def _row_squares(base: nn.Module) -> mx.array:
    """Return the squared norm of each row of a layer's weight, quantized or not. (n,) float32"""
    return mx.square(float32_weight(base)).sum(-1)


def _weight_times(base: nn.Module, columns: mx.array) -> mx.array:
    """Return the matrix product of a layer's weight and `columns`. (in, r) -> (n, r) float32"""
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
    """Return the layer `base` with a new adapter, which does not change the layer's output yet.

    Args:
        name: Name of the layer for error messages.

    Raises:
        ModelError: this type of layer cannot have an adapter.
        ConfigError: mlx-lm has no DoRA for this type of layer.
    """
    sizes = {"r": rank, "scale": scale, "dropout": dropout}
    adapted: nn.Module
    # The constructors make a dense layer first; it is lazy and never allocated.
    if type(base) in LINEAR_TYPES:
        linear_type = LoRALinear if kind == "lora" else DoRALinear
        adapted = linear_type(_input_size(base), base.weight.shape[0], **sizes)
        adapted.linear = base
    elif type(base) in EXPERT_TYPES:
        if kind == "dora":
            raise ConfigError(
                f"fine_tune_type `dora`: `{name}` is a layer of experts, for which mlx-lm and "
                "PEFT do not support DoRA; use `lora`, or name other layers in "
                "`lora_target_modules`"
            )
        adapted = LoRASwitchLinear(base.input_dims, base.output_dims, base.num_experts, **sizes)
        adapted.linear = base
    elif type(base) in EMBEDDING_TYPES:
        embedding_type = LoRAEmbedding if kind == "lora" else DoRAEmbedding
        adapted = embedding_type(base.weight.shape[0], _input_size(base), **sizes)
        adapted.embedding = base
    else:
        raise ModelError(f"`{name}`: a layer of type "
                         f"`{type(base).__name__}` cannot have an adapter")  # fmt: skip
    if isinstance(adapted, DORA_TYPES):
        adapted.init_magnitude()
    return adapted


def base_layer(adapted: nn.Module) -> nn.Module:
    """Return the base layer of an adapted layer."""
    base: nn.Module = adapted["embedding" if isinstance(adapted, LoRAEmbedding) else "linear"]
    return base


def adapter_rank(adapted: nn.Module) -> int:
    """Return the rank of an adapted layer."""
    rank: int = adapted.lora_a.shape[-2 if isinstance(adapted, LoRASwitchLinear) else -1]
    return rank


def adapter_dropout(adapted: nn.Module) -> float:
    """Return the dropout probability of an adapted layer."""
    return round(1 - float(adapted.dropout._p_1), 12)  # MLX stores only its complement


def _input_size(base: nn.Module) -> int:
    """Return the number of inputs of a layer, quantized or not."""
    width: int = base.weight.shape[-1]
    return width * 32 // base.bits if "scales" in base else width
