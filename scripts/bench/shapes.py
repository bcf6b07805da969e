"""Model shapes and checkpoints with random weights: real architectures, nothing downloaded."""

import json
import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SEED = 0
STD = 0.04  # near 1/sqrt(hidden), as such models are initialized


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a Llama model that determine its cost."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int

    def config(self) -> dict[str, Any]:
        """Return the `config.json` of a Llama with this shape and tied embeddings."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **asdict(self),
            "head_dim": self.hidden_size // self.num_attention_heads,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 100000.0,
            "max_position_embeddings": 8192,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of the weights, with the names of the original checkpoints."""
        hidden, inner = self.hidden_size, self.intermediate_size
        keys = hidden // self.num_attention_heads * self.num_key_value_heads
        block = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        outer = {"embed_tokens": (self.vocab_size, hidden), "norm": (hidden,)}
        blocks = {
            f"layers.{layer}.{name}": shape
            for layer in range(self.num_hidden_layers)
            for name, shape in block.items()
        }
        return {f"model.{name}.weight": shape for name, shape in (outer | blocks).items()}

    def parameters(self) -> int:
        """Return the number of parameters; the tied embedding counts once."""
        return sum(math.prod(shape) for shape in self.tensors().values())


SHAPES = {
    "smollm2-135m": Shape(
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=49152,
    ),
    "tiny": Shape(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        intermediate_size=96,
        vocab_size=2048,
    ),
}


def write_checkpoint(folder: Path, shape: Shape, tokenizer: Path) -> None:
    """Write a float32 checkpoint that mlx-lm and transformers load.

    It is written under another name and renamed, so that an existing folder is complete.

    Args:
        tokenizer: folder with the tokenizer's files.
    """
    import mlx.core as mx

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(tokenizer, partial)
    ids = json.loads((tokenizer / "special_ids.json").read_text())
    config = shape.config() | {"eos_token_id": ids["eos"], "pad_token_id": ids["pad"]}
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    mx.random.seed(SEED)
    weights = {
        name: mx.ones(size) if len(size) == 1 else mx.random.normal(size) * STD
        for name, size in shape.tensors().items()
    }
    mx.save_safetensors(str(partial / "model.safetensors"), weights, {"format": "pt"})
    os.replace(partial, folder)
