"""Tiny models of many architectures, and scores whose gradients differ for every output."""

import copy
from importlib import import_module

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from mlx_dpo.adapters.attach import attach_adapters

VOCAB = 48
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5,
    "head_dim": 8,
}
GATED_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
    "full_attention_interval": 2,
}
MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
MODELS = {
    "llama": {"rope_theta": 10000.0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": MOE,
    "gemma3_text": {"sliding_window": 4, "sliding_window_pattern": 2},
    "mamba": {
        "state_size": 4,
        "conv_kernel": 3,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
    "qwen3_next": {
        **GATED_DELTA,
        **MOE,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "rope_theta": 1000.0,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 1000,
    },
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "hunyuan": {
        "use_cla": True,
        "cla_share_factor": 2,
        "num_experts": 2,
        "moe_topk": 1,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "attention_bias": False,
        "rope_theta": 10000.0,
        "rope_scaling": {"factor": 1.0, "alpha": 1.0, "type": "dynamic"},
    },
    "gemma4_text": {
        "num_kv_shared_layers": 2,
        "global_head_dim": 8,
        "sliding_window": 4,
        "num_hidden_layers": 4,
        "layer_types": 2 * ["sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
    },
}


def make(kind, *, dropout=0.0):
    """Return a tiny model of an architecture with nonzero adapters."""
    module = import_module(f"mlx_lm.models.{kind}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict({"model_type": kind, **SIZES, **MODELS[kind]}))
    attach_adapters(model, rank=2, scale=2.0, dropout=dropout, seed=1)
    mx.random.seed(2)
    for _, module in model.named_modules():
        if "lora_b" in module:
            module.lora_b = 0.3 * mx.random.normal(module.lora_b.shape)
    mx.eval(model.parameters())
    return model.train()


def whole(model):
    """Score two rows of 70 tokens, without caches."""
    tokens = mx.arange(140).reshape(2, 70) * 7 % VOCAB
    return weighted(model(tokens))


def shared_prompt(model):
    """Score two completions that continue copies of the caches of a prompt of 66 tokens."""
    cache = make_prompt_cache(model)
    total = weighted(model(mx.arange(66)[None] * 5 % VOCAB, cache=cache))
    for completion in (list(range(40)), [9]):
        total = total + weighted(model(mx.array([completion]), cache=copy.deepcopy(cache)))
    return total


def weighted(logits):
    """Return a sum of logits with a different weight each."""
    return (logits * mx.sin(mx.arange(logits.size)).reshape(logits.shape)).sum()


def loss_and_gradients(model, scores):
    loss, gradients = nn.value_and_grad(model, scores)(model)
    gradients = dict(tree_flatten(gradients))
    mx.eval(loss, gradients)
    return loss.item(), gradients


def distance(ours, theirs):
    """Return the relative error over all parameters together."""
    assert ours.keys() == theirs.keys()
    norms = [
        sum(mx.square(value).sum().item() for value in values)
        for values in ([ours[name] - theirs[name] for name in theirs], theirs.values())
    ]
    return (norms[0] / norms[1]) ** 0.5
