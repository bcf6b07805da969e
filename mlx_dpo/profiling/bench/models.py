"""Build or load the model to measure, after checking that a step fits into memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.adapters.attach import attach_adapters
from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.errors import ConfigError
from mlx_dpo.generation.context import context_length
from mlx_dpo.models.device import cast_model, is_cpu, main_dtype, prepare_for_cpu
from mlx_dpo.models.download import is_hub_id, resolve_model
from mlx_dpo.models.empty_weights import build_model, load_empty_model
from mlx_dpo.models.load import LoadedModel, load_model
from mlx_dpo.models.quantize import quantize_model
from mlx_dpo.optim.optimizers import build_optimizer, count_state_bytes
from mlx_dpo.phases import phase
from mlx_dpo.profiling import memory
from mlx_dpo.profiling.bench.shapes import SEED, SHAPES
from mlx_dpo.profiling.device_memory import MemoryBudget
from mlx_dpo.profiling.layer_subset import choose_layer_subsets, with_layers
from mlx_dpo.profiling.profile import TrainingPass, profile_training_pass
from mlx_dpo.scoring.scorers import memory_efficient_training
from mlx_dpo.scoring.select_scorer import select_scorer
from mlx_dpo.training.objective import Objective
from mlx_dpo.types import TokenizedPair
from mlx_dpo.units import format_bytes

BOUND_MARGIN = 1.5  # an upper bound that fits this many times needs no measurement

Pairs = Sequence[TokenizedPair]


@dataclass(frozen=True)
class BenchModel:
    """A model with new adapters, and what a run would know about it."""

    model: nn.Module
    config: dict[str, Any]  # content of `config.json`
    name: str
    vocab_size: int
    notes: Sequence[str] = ()

    @property
    def dtype(self) -> str:
        """Name of the dtype of most floating-point weights, in which products are computed."""
        return main_dtype(self.model)

    @property
    def bits(self) -> int | None:
        """Bits of the weights as they are held; None if they are not quantized."""
        packed = [m.bits for m in self.model.modules() if "scales" in m and hasattr(m, "bits")]
        return min(packed, default=None)


def load_bench_model(
    source: str | None, *, shape: str, bits: int | None, pairs: Pairs, room: MemoryBudget
) -> BenchModel:
    """Load the model `source`, or build one of the shape `shape`; attach new adapters.

    Nothing is downloaded. Memory is estimated before weights are allocated.

    Args:
        source: folder or Hub id of a model in the Hub's cache; None builds a random model.
        shape: name of an entry of SHAPES, for a random model.
        bits: bits per weight to quantize to; None keeps the weights.
        pairs: pairs of the smallest pass; a step with them must fit.
        room: memory that may be used.

    Raises:
        ConfigError: the model does not fit into memory, or its context is too short.
        ModelError: the model cannot be found or read.
    """
    if source is None:
        base = build_random_model(shape, bits=bits)
        _attach(base)
        check_memory(base, pairs, room)
        with phase("Making random weights"):
            mx.eval(base.model.parameters())
        return base
    folder = resolve_model(source, is_local=True)
    path, name = str(folder), source if is_hub_id(source) else folder.name
    empty = _as_bench_model(load_empty_model(path, bits=bits), name)
    _check_context(empty, pairs)
    _attach(empty)
    check_memory(empty, pairs, room)
    del empty
    base = _as_bench_model(load_model(path, bits=bits), name)
    _attach(base)
    return base


def build_random_model(shape: str, *, bits: int | None = None) -> BenchModel:
    """Return a model with lazy random weights in the dtype that suits the device.

    On the CPU this is float32, elsewhere bfloat16. On the CPU, weights are dequantized as in
    training.

    Args:
        shape: name of an entry of SHAPES.
        bits: bits per weight to quantize to; None quantizes nothing.

    Raises:
        ConfigError: no layer can be quantized.
    """
    mx.random.seed(SEED)
    sizes = SHAPES[shape]
    config = sizes.config()
    notes: tuple[str, ...] = ("random weights",)
    model = build_model(config)
    cast_model(model, mx.float32 if is_cpu() else mx.bfloat16)
    if bits is not None:
        config, more = quantize_model(model, config, bits, None)
        notes += more
    if is_cpu():
        notes += prepare_for_cpu(model)
    model.freeze()
    model.eval()
    return BenchModel(model, config, f"shape of {shape}", sizes.vocab_size, notes)


def _as_bench_model(base: LoadedModel, name: str) -> BenchModel:
    notes = (*base.notes, *base.storage_notes)
    return BenchModel(base.model, base.config, name, base.vocab_size, notes)


def _attach(base: BenchModel) -> None:
    settings = DPOConfig()
    attach_adapters(base.model, rank=settings.rank, scale=settings.lora_scale, seed=SEED)


def _check_context(base: BenchModel, pairs: Pairs) -> None:
    """Raise `ConfigError` if the model's context is shorter than the pairs."""
    context, longest = context_length(base.config), max(map(len, pairs))
    if context is not None and context < longest:
        raise ConfigError(
            f"{base.name}: has a context of {context} tokens, and the pairs have {longest}; "
            "use another model"
        )


def check_memory(base: BenchModel, pairs: Pairs, room: MemoryBudget) -> None:
    """Raise `ConfigError` if a step with `pairs` does not fit into memory.

    An upper bound from array shapes comes first. If that does not clearly fit, a few layers are
    measured. No weights are allocated before it is known that they fit.
    """
    model, optimizer_bytes = base.model, _optimizer_bytes(base.model)
    bound = memory.step_peak_upper_bound(
        model,
        base.config,
        pairs,
        vocab_size=base.vocab_size,
        optimizer_bytes=optimizer_bytes,
    )
    if bound is not None and BOUND_MARGIN * bound <= room.bytes:
        return
    needed = memory.resident_bytes(model, optimizer_bytes)
    if needed <= room.bytes:
        with phase("Estimating memory"):
            needed = _measured_peak(base, pairs, optimizer_bytes, room)
    if needed > room.bytes:
        raise ConfigError(
            f"{base.name}: a step needs about {format_bytes(needed, is_estimate=True)}, and there "
            f"are {format_bytes(room.bytes, is_estimate=True)} ({room.description}); "
            "use a smaller model, or --bits 4"
        )


def _measured_peak(base: BenchModel, pairs: Pairs, optimizer_bytes: int, room: MemoryBudget) -> int:
    """Return the peak memory of a step, extrapolated from a few layers of the model."""
    model = base.model
    with with_layers(model, choose_layer_subsets(model).large):
        mx.eval(model.parameters())
        with memory_efficient_training(model, recompute=False):
            choice = select_scorer(model, vocab_size=base.vocab_size)
    objective = Objective(DPOConfig())
    settings = TrainingPass(scorer=choice.scorer, objective=objective, accumulates=False)
    profile = profile_training_pass(model, pairs, settings, memory=room.bytes)
    return memory.step_peak_bytes(model, profile.bytes, optimizer_bytes)


def _optimizer_bytes(model: nn.Module) -> int:
    return count_state_bytes(build_optimizer(DPOConfig().optim, model, 1.0))
