"""Shapes of the models and pairs that are measured: real architectures, random contents."""

import math
import random
from dataclasses import asdict, dataclass
from typing import Any

from mlx_dpo.types import TokenizedPair

SEED = 0


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


@dataclass(frozen=True)
class PassShape:
    """Lengths of a pair in tokens, and the number of such pairs in a pass."""

    prompt: int
    chosen: int
    rejected: int
    pairs: int

    @classmethod
    def parse(cls, text: str) -> "PassShape":
        """Parse `PROMPT:CHOSEN:REJECTED:PAIRS`; raise `ValueError` for anything else."""
        point = cls(*(int(part) for part in text.split(":")))
        if min(point.prompt, point.chosen, point.rejected, point.pairs) < 1:
            raise ValueError("every number has to be at least 1")
        return point

    def draw(self, vocab_size: int) -> list[TokenizedPair]:
        """Return random pairs of these lengths; the same at every call."""
        tokens = RandomTokens(vocab_size)
        return [
            TokenizedPair(tokens(self.prompt), tokens(self.chosen), tokens(self.rejected))
            for _ in range(self.pairs)
        ]


class RandomTokens:
    """A source of random token ids; the same ids for every new source."""

    def __init__(self, vocab_size: int) -> None:
        self._draw, self._vocab_size = random.Random(SEED), vocab_size

    def __call__(self, count: int) -> tuple[int, ...]:
        """Return the next `count` token ids."""
        return tuple(self._draw.randrange(self._vocab_size) for _ in range(count))
