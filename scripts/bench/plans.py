"""Estimated and measured memory of an optimizer step, for a grid of model shapes."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.models.device import device_kind, prepare_for_cpu
from mlx_dpo.models.empty_weights import build_model
from mlx_dpo.models.load import LoadedModel
from mlx_dpo.profiling import memory
from mlx_dpo.profiling.bench.shapes import SEED, SHAPES, PassShape
from mlx_dpo.profiling.layer_subset import choose_layer_subsets, with_layers
from mlx_dpo.runs.auto_batch_size import profile_micro_batch
from mlx_dpo.runs.build import (
    attach_adapters,
    choose_scorer,
    make_optimizer,
    make_plan,
    optimizer_state_bytes,
)
from mlx_dpo.scoring.kernels.gated_delta import use_fused_gated_delta
from mlx_dpo.scoring.select_scorer import ScorerChoice
from mlx_dpo.training import loop
from mlx_dpo.types import PairLogps, TokenizedPair

GROUP_SIZE = 64
COMMON = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 8192}
QWEN3 = COMMON | {
    "model_type": "qwen3",
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
MOE = COMMON | {
    "model_type": "qwen3_moe",
    "hidden_size": 256,
    "num_hidden_layers": 10,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 16384,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],  # the first layer is dense
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
HYBRID = MOE | {
    "model_type": "qwen3_next",
    "num_hidden_layers": 12,
    "mlp_only_layers": [],
    "shared_expert_intermediate_size": 256,
    "linear_num_value_heads": 8,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "partial_rotary_factor": 0.5,
}
CONFIGS: Mapping[str, dict[str, Any]] = {
    "smollm2-135m": SHAPES["smollm2-135m"].config(),
    "qwen3-152k": QWEN3,
    "moe": MOE,
    "hybrid": HYBRID,
}


@dataclass(frozen=True)
class Case:
    """A grid point: model shape, lengths, and settings."""

    shape: str
    point: PassShape
    recompute: bool = False
    scorer: str = "auto"
    bits: int | None = None

    def settings(self) -> DPOConfig:
        """Return the settings of a run with two passes per step."""
        return DPOConfig(
            batch_size=2 * self.point.pairs,
            micro_batch_size=self.point.pairs,
            recompute=self.recompute,
            scorer=self.scorer,
            warmup_ratio=0.0,
            lora_r=8,
            learning_rate=1e-4,
        )

    def draw_step(self, vocab_size: int) -> list[TokenizedPair]:
        """Return the random pairs of a step; equal ones would share all their tokens."""
        return replace(self.point, pairs=2 * self.point.pairs).draw(vocab_size)


@dataclass(frozen=True)
class MemoryComparison:
    """Peak memory of a step, estimated and measured, and the part held between steps, in bytes."""

    planned: int
    measured: int
    resident: int
    scorer: str

    @property
    def ratio(self) -> float:
        """Ratio of estimated to measured memory."""
        return self.planned / self.measured

    @property
    def ratio_beyond(self) -> float:
        """The same ratio without the resident part, which is known exactly."""
        return (self.planned - self.resident) / (self.measured - self.resident)


def compare_memory(case: Case) -> MemoryComparison:
    """Estimate a step without weights, then create the weights and measure it."""
    config = case.settings()
    pairs = case.draw_step(CONFIGS[case.shape]["vocab_size"])
    with ExitStack() as stack:
        base = _empty_model(case)
        stack.enter_context(use_fused_gated_delta(base.model))
        attach_adapters(base, config)
        with with_layers(base.model, choose_layer_subsets(base.model).large):
            mx.eval(base.model.parameters())
            choice = choose_scorer(base, config)
        cost = profile_micro_batch(base, config, choice, pairs[: case.point.pairs])
        optimizer_bytes = optimizer_state_bytes(base.model, config)
        planned = memory.step_peak_bytes(base.model, cost.bytes, optimizer_bytes)
        resident = memory.resident_bytes(base.model, optimizer_bytes)
    del base
    mx.clear_cache()
    return MemoryComparison(planned, _measured_peak(case, config, choice), resident, choice.name)


def _empty_model(case: Case, *, packed: bool = False) -> LoadedModel:
    mx.random.seed(SEED)
    config = CONFIGS[case.shape]
    model = build_model(config)
    if case.bits is not None and (packed or device_kind() != "cpu"):
        nn.quantize(model, GROUP_SIZE, case.bits)
    model.freeze()
    return LoadedModel(model, None, config, Path(), case.shape, config["vocab_size"], ())


def _measured_peak(case: Case, config: DPOConfig, choice: ScorerChoice) -> int:
    base = _empty_model(case, packed=True)
    model = base.model
    mx.eval(model.parameters())
    if device_kind() == "cpu":
        prepare_for_cpu(model)
    with use_fused_gated_delta(model):
        attach_adapters(base, config)
        optimizer = make_optimizer(model, config)
        mx.eval(model.parameters(), optimizer.state)
        pairs = case.draw_step(base.vocab_size)
        zeros = mx.zeros((len(pairs),))
        plan = make_plan(config, pairs, PairLogps(zeros, zeros), choice=choice, total_steps=2)
        mx.clear_cache()
        mx.reset_peak_memory()
        for _ in loop.train(model, optimizer, plan, start=loop.Progress()):
            pass
    return mx.get_peak_memory()
