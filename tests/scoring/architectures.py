"""A small random model of every architecture of mlx-lm that can be built on a CPU.

A configuration is made from the architecture's own `ModelArgs`: each field that has a small
value in SMALL gets it, the others keep their defaults, and OWN has what one architecture alone
needs. Windows are as narrow as WINDOW, so that ordinary prompts do not fit into them.
"""

import copy
import importlib
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
from mlx.utils import tree_map

from mlx_dpo.adapters.attach import attach_adapters
from mlx_dpo.adapters.targets import linear_names

VOCAB = 128
WINDOW = 4
LAYERS = 4

SMALL: dict[str, Any] = {
    # width and depth
    **dict.fromkeys(("hidden_size", "hidden_dim", "n_embd", "d_model", "model_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), LAYERS),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "n_inner"), 64),
    **dict.fromkeys(("ffn_hidden_size", "mlp_hidden_size", "ff_intermediate_size"), 64),
    **dict.fromkeys(("vocab_size", "num_vocab", "embedding_size"), VOCAB),
    # attention
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "hidden_size_per_head", "kv_channels", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("v_head_dim", "kv_lora_rank", "index_head_dim", "index_topk"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "index_n_heads"), 4),
    **dict.fromkeys(("q_lora_rank", "global_head_dim"), 16),
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size"), WINDOW),
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_bias", "use_qkv_bias"), False),
    **dict.fromkeys(("sliding_window_pattern",), 2),
    **dict.fromkeys(("use_qk_norm", "qk_norm", "gating"), True),
    # positions and norms
    **dict.fromkeys(("rope_theta",), 10000.0),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "block_size"), 256),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"), 1e-5),
    **dict.fromkeys(("layernorm_epsilon",), 1e-5),
    **dict.fromkeys(("partial_rotary_factor",), 0.5),
    "tie_word_embeddings": False,
    # mixtures of experts
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 4),
    **dict.fromkeys(("moe_num_experts",), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk"), 2),
    **dict.fromkeys(("moe_top_k", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "share_expert_dim"), 16),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "num_shared_expert"), 1),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("decoder_sparse_step", "moe_layer_freq"), 1),
    **dict.fromkeys(("norm_topk_prob",), True),
    "routed_scaling_factor": 1.0,
    "mlp_only_layers": [],
    "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
    # state spaces and linear attention
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 32),
    **dict.fromkeys(("linear_conv_kernel_dim", "conv_kernel", "mamba_d_conv", "conv1d_width"), 4),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("time_step_rank",), 4),
    **dict.fromkeys(("use_conv_bias", "mamba_conv_bias", "conv_bias"), True),
    **dict.fromkeys(("mamba_proj_bias",), False),
    **dict.fromkeys(("conv_L_cache",), 3),
    # scales
    **dict.fromkeys(("logits_scaling", "attention_multiplier", "embedding_multiplier"), 2.0),
    **dict.fromkeys(("residual_multiplier", "scale_emb", "scale_depth"), 2.0),
    "dim_model_base": 16,
}

SLIDING = ["sliding_attention", "full_attention"] * (LAYERS // 2)
DELTA = {"kda_layers": [1, 2, 3], "full_attn_layers": [4], "num_heads": 4, "head_dim": 8}
YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}
LONGROPE = {"type": "longrope", "original_max_position_embeddings": 256}

OWN: dict[str, dict[str, Any]] = {
    "afm7": {"num_kv_reuse_layers": 2},
    "apertus": {"post_norm": False},
    "baichuan_m1": {"sliding_window_layers": [0, 2], "conv_window": 2},
    "bailing_hybrid": {"layer_group_size": 2, "group_norm_size": 1},
    "bailing_moe_linear": {"layer_group_size": 2, "group_norm_size": 1},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"rope_scaling": YARN},
    "exaone4": {"rope_scaling": None, "sliding_window_pattern": "LG"},
    "exaone_moe": {"is_moe_layer": [False, True, True, True]},
    "gemma4_text": {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
        "num_kv_shared_layers": 2,
    },
    "glm4_moe": {"rope_scaling": None},
    "glm_moe_dsa": {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "rope_parameters": {"rope_theta": 10000.0},
    },
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.5},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * 2,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
    },
    "hunyuan": {
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0},
    },
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_expand": 2,
    },
    "kimi_linear": {
        "linear_attn_config": DELTA | {"short_conv_kernel_size": 4},
        "model_max_length": 256,
    },
    "lfm2": {
        "layer_types": ["conv", "full_attention"] * 2,
        "block_dim": 32,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "use_expert_bias": True},
    "lille-130m": {"n_embd": 64},
    "llama4_text": {"no_rope_layers": [1, 0, 1, 0]},
    "longcat_flash": {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "zero_expert_num": 2,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "longcat_flash_ngram": {
        "zero_expert_num": 2,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "ngram_vocab_size_ratio": 2,
    },
    "mamba2": {"n_groups": 1, "time_step_limit": [0.001, 100.0], "num_heads": 8},
    "mellum": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in set(SLIDING)
        }
    },
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 0, 1],
        "moe_layer_freq": [0, 1, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": WINDOW,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "swa_rope_theta": 10000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "minicpm3": {"rope_scaling": LONGROPE},
    "ministral3": {
        "rope_parameters": {
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 8,
        }
    },
    "mistral4": {
        "rope_parameters": {
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 8,
        }
    },
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"no_op": True}},
            {"attention": {"replace_with_linear": True}, "ffn": {"replace_with_linear": True}},
        ]
    },
    "nemotron_h": {
        "hybrid_override_pattern": ["M", "*", "-", "E"],
        "layer_types": None,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 1,
    },
    "olmo_hybrid": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_allow_neg_eigval": True,
    },
    "openelm": {
        "num_transformer_layers": LAYERS,
        "ffn_dim_divisor": 8,
        "num_query_heads": [4] * LAYERS,
        "num_kv_heads": [2] * LAYERS,
        "ffn_multipliers": [1.0, 1.5, 2.0, 2.0],
    },
    "phi3small": {"dense_attention_every_n_layers": 1, "gegelu_limit": 20.0},
    "plamo": {"n_shared_head": 2},
    "recurrent_gemma": {"logits_soft_cap": 30.0, "block_types": ["recurrent", "attention"]},
    "rwkv7": dict.fromkeys(
        ("a_low_rank_dim", "v_low_rank_dim", "gate_low_rank_dim", "decay_low_rank_dim"), 8
    ),
    "spark2_5": {"rope_parameters": {kind: {"rope_theta": 10000.0} for kind in set(SLIDING)}},
    "step3p5": {"num_attention_groups": 2, "moe_layers_enum": "1,2,3"},
}

# The text model inside those that also see images, where it is an architecture of its own.
TEXT = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "kimi_k25": "deepseek_v3",
    "lfm2-vl": "lfm2",
    "mistral3": "ministral3",
    "pixtral": "llama",
    "qwen2_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
    "qwen3_5_moe": "qwen3_5",
}
TEXT_ARGS = ("TextModelArgs", "TextArgs", "TextConfig")
OWN_TEXT: dict[str, dict[str, Any]] = {
    "gemma3n": {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
        "num_kv_shared_layers": 2,
        "rope_local_base_freq": 10000.0,
        "final_logit_softcapping": 30.0,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "altup_num_inputs": 2,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 8,
    },
    "kimi_k3": {
        "linear_attn_config": DELTA | {"short_conv_kernel_size": 4, "gate_lower_bound": -5.0},
        "routed_expert_hidden_size": 16,
        "activation_situ_beta": 1.0,
        "attn_res_block_size": 2,
    },
    "llama4": {
        "attention_chunk_size": WINDOW,
        "interleave_moe_layer_step": 2,
        "num_experts_per_tok": 1,
        "rope_scaling": None,
    },
    "minimax_m3_vl": {
        "dense_intermediate_size": 64,
        "moe_layer_freq": [0, 1, 1, 1],
        "index_block_size": 2,
        "index_topk_blocks": 4,
    },
    "muse_spark": {
        "post_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0},
        "layer_rope_theta": [10000.0] * LAYERS,
        "final_logit_softcapping": 20.0,
        "output_multiplier": 0.2,
        "moe_hidden_size": 16,
        "num_shared_experts": 0,
    },
    "qwen3_5": {"full_attention_interval": 2},
    "qwen3_5_moe": {"full_attention_interval": 2, "num_experts": 4},
}
OWN["qwen3_next"] = {"full_attention_interval": 2}


# What cannot be built or run here, and why.
UNBUILT = {
    "bitnet": "needs Metal",
    "muse_spark": "needs Metal",
    "olmo": "needs another package",
    "phi3small": "crashes MLX on the CPU",
    "prism_hadamard_qwen35": "exists with packed weights only",
    "recurrent_gemma": "cannot be frozen: `_no_grad` is missing",
}


def model_types() -> list[str]:
    """Every module of mlx-lm that holds an architecture."""
    folder = Path(mlx_lm.models.__file__).parent
    return sorted(f.stem for f in folder.glob("*.py") if "\nclass Model(" in f.read_text())


def config(model_type: str) -> dict[str, Any]:
    """The configuration of a small model, as `config.json` would hold it."""
    module = _module(model_type)
    small = _small(module.ModelArgs) | OWN.get(model_type, {})
    if "text_config" in {f.name for f in fields(module.ModelArgs)}:
        small["text_config"] = _text(model_type)
    return {"model_type": model_type, **small}


def _text(model_type: str) -> dict[str, Any]:
    inner = TEXT.get(model_type)
    if inner in OWN_TEXT:
        return _text(inner) | OWN_TEXT.get(model_type, {})
    if inner:
        return config(inner)
    module = _module(model_type)
    [args] = [vars(module)[name] for name in TEXT_ARGS if name in vars(module)]
    return {"model_type": model_type, **_small(args), **OWN_TEXT.get(model_type, {})}


def _small(args: type) -> dict[str, Any]:
    return {f.name: copy.deepcopy(SMALL[f.name]) for f in fields(args) if f.name in SMALL}


def _module(model_type: str) -> ModuleType:
    return importlib.import_module(f"mlx_lm.models.{model_type}")


def build(model_type: str) -> nn.Module:
    """The model, with random weights everywhere."""
    module = _module(model_type)
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(config(model_type)))

    def fill(value: mx.array) -> mx.array:
        floating = mx.issubdtype(value.dtype, mx.floating)
        return 0.1 * mx.random.normal(value.shape) if floating and not mx.any(value) else value

    model.update(tree_map(fill, model.parameters()))
    mx.eval(model.parameters())
    return model


def adapt(model: nn.Module) -> nn.Module:
    """Adapters on every plain linear layer in the blocks."""
    kinds: dict[str, set[type]] = {}
    for layer in model.layers:
        for name, module in layer.named_modules():
            kinds.setdefault(name, set()).add(type(module))
    plain = [name for name in linear_names(model) if kinds[name] <= {nn.Linear}]
    attach_adapters(model, rank=2, scale=2.0, target_modules=plain)
    return model
