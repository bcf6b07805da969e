"""Tiny checkpoints for tests, in the layout of the Hub: a Llama, its tokenizer and template.

from tests.checkpoints import make_checkpoint
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import gpt2, llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mlx_dpo.adapters.adapter_files import save_adapter
from mlx_dpo.adapters.attach import attach_adapters, make_adapter_config

SPECIAL = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>")  # ids 0, 1, 2, 3
END = SPECIAL.index("<|end|>")
VOCAB = 300

TEMPLATE = """\
{%- for message in messages -%}
<|{{ message.role }}|>{{ message.content }}<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"""

TEXT = (
    "The cat sat on the mat and the other cat sat on the hat.",
    "Where is the house? The house is there, on the hill.",
    "She said that the weather in the north was better than here.",
)


def make_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    tied: bool = False,
    dtype: mx.Dtype = mx.float32,
    hidden: int = 64,
    **config: Any,
) -> Path:
    """Write a Llama of 2 layers with random weights to `folder`; returns `folder`.

    Other entries of `config.json` may be given as keywords (`num_hidden_layers=4`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries = _config(hidden, tied, dtype) | config
    _write_json(folder / "config.json", entries)
    model = llama.Model(llama.ModelArgs.from_dict(entries))
    weights = random_weights(model, seed=seed, dtype=dtype)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    write_tokenizer(folder)
    return folder


def make_gpt2_checkpoint(folder: Path, *, positions: int) -> Path:
    """Write a GPT-2 of 2 layers that has learned `positions` positions; returns `folder`."""
    make_checkpoint(folder)
    entries = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_ctx": positions,
        "n_positions": positions,
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 2,
        "layer_norm_epsilon": 1e-5,
        "vocab_size": VOCAB,
        "eos_token_id": END,
        "torch_dtype": "float32",
    }
    _write_json(folder / "config.json", entries)
    model = gpt2.Model(gpt2.ModelArgs.from_dict(entries))
    weights = random_weights(model, seed=0, dtype=mx.float32)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    return folder


def random_weights(
    model: llama.Model | gpt2.Model, *, seed: int, dtype: mx.Dtype
) -> dict[str, mx.array]:
    """Weights for every parameter, from `seed` alone, also put into `model`.

    Matrices are normal and wide enough for uneven logits; norms lie around one.
    """
    weights = {}
    key = mx.random.key(seed)
    for name, value in tree_flatten(model.parameters()):
        key, draw = mx.random.split(key)
        noise = mx.random.normal(value.shape, key=draw)
        matrix = value.ndim > 1
        weights[name] = noise * (2 / value.shape[-1] ** 0.5) if matrix else 1 + 0.1 * noise
        weights[name] = weights[name].astype(dtype)
    model.update(tree_unflatten(list(weights.items())))
    return weights


def write_tokenizer(folder: Path) -> None:
    """Byte-level BPE with 300 entries, the special tokens first, and a ChatML-like template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|end|>",
            "pad_token": "<|pad|>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 512,
        },
    )


def add_bos_token(folder: Path) -> Path:
    """Let the tokenizer of a checkpoint begin each text with `<|pad|>`; returns `folder`."""
    path = folder / "tokenizer.json"
    entries = json.loads(path.read_text(encoding="utf-8"))
    begin = {"SpecialToken": {"id": "<|pad|>", "type_id": 0}}
    entries["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<|pad|>": {"id": "<|pad|>", "ids": [0], "tokens": ["<|pad|>"]}},
    }
    _write_json(path, entries)
    path = folder / "tokenizer_config.json"
    _write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"bos_token": "<|pad|>"})
    return folder


def leave_out_system_messages(folder: Path) -> Path:
    """Let the chat template of a checkpoint write no system messages; returns `folder`."""
    path = folder / "chat_template.jinja"
    text = path.read_text(encoding="utf-8")
    text = text.replace("<|{{", "{%- if message.role != 'system' -%}<|{{")
    text = text.replace("{%- endfor -%}", "{%- endif -%}{%- endfor -%}")
    path.write_text(text, encoding="utf-8")
    return folder


def _config(hidden: int, tied: bool, dtype: mx.Dtype) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": 2,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": hidden // 4,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "eos_token_id": END,
        "torch_dtype": str(dtype).removeprefix("mlx.core."),
    }


def _write_json(path: Path, entries: dict[str, Any]) -> None:
    path.write_text(json.dumps(entries, indent=2, sort_keys=True), encoding="utf-8")


def make_adapter(folder: Path, model: str) -> Path:
    """An adapter of large, random weights on a checkpoint: another mind on the same model."""
    policy = mlx_lm.load(model)[0]
    attach_adapters(policy, rank=4, scale=8.0)
    for path, module in policy.named_modules():
        if path.endswith("_proj"):
            module.lora_b = mx.random.normal(module.lora_b.shape, key=mx.random.key(2)) * 0.2
    save_adapter(folder, policy, make_adapter_config(policy))
    return folder
