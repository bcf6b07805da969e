"""Write small checkpoints whose tokens are whole words, in the layout of the Hub.

A prompt `x` and an answer `y` of words have the tokens

    <|user|> x <|end|> <|assistant|> y <|end|>

`prompt_ids` and `answer_ids` state this on their own, without the package's tokenization, so that
a fault there cannot hide itself in the measurements.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

END, USER, ASSISTANT, SYSTEM = range(4)  # ids of the special tokens
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
TEMPLATE = """\
{%- for message in messages -%}
<|{{ message.role }}|>{{ message.content }}<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"""


class Words:
    """The vocabulary of a checkpoint: the special tokens, then the words."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        self.ids = {word: len(SPECIAL) + index for index, word in enumerate(words)}

    def __len__(self) -> int:
        return len(SPECIAL) + len(self.words)

    def prompt_ids(self, prompt: str, system: str | None = None) -> list[int]:
        """Return the token ids before the answer."""
        user = [USER, *self._word_ids(prompt), END, ASSISTANT]
        return user if system is None else [SYSTEM, *self._word_ids(system), END, *user]

    def answer_ids(self, answer: str) -> list[int]:
        """Return the token ids of an answer, with the end."""
        return [*self._word_ids(answer), END]

    def _word_ids(self, text: str) -> list[int]:
        return [self.ids[word] for word in text.split()]


def write_checkpoint(
    folder: Path,
    vocabulary: Words,
    *,
    seed: int,
    hidden: int = 48,
    layers: int = 2,
    spread: float = 1.0,
    head: float = 6.0,
) -> Path:
    """Write a Llama with random weights to `folder`; return `folder`.

    Args:
        spread: standard deviation of the weights, as a multiple of 1 / sqrt(inputs): 2 gives
            uneven probabilities, 1 nearly even ones.
        head: the same for the output layer, which is not trained: the final norm bounds its input,
            so that it bounds the log-ratios that a policy can reach.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(len(vocabulary), hidden, layers)
    _write_json(folder / "config.json", config)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    weights, key = {}, mx.random.key(seed)
    for name, value in tree_flatten(model.parameters()):
        key, draw = mx.random.split(key)
        noise = mx.random.normal(value.shape, key=draw)
        is_matrix = value.ndim > 1
        scale = head if name == "lm_head.weight" else spread
        noise *= scale / value.shape[-1] ** 0.5
        weights[name] = noise if is_matrix else mx.ones_like(value)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    _write_tokenizer(folder, vocabulary)
    return folder


def _write_tokenizer(folder: Path, vocabulary: Words) -> None:
    ids = {token: index for index, token in enumerate(SPECIAL)} | vocabulary.ids
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=SPECIAL[END]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": SPECIAL[END],
            "pad_token": SPECIAL[END],
            "clean_up_tokenization_spaces": False,
            "model_max_length": 64,
        },
    )


def _config(vocabulary: int, hidden: int, layers: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": hidden // 4,
        "vocab_size": vocabulary,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": END,
        "torch_dtype": "float32",
    }


def _write_json(path: Path, entries: dict[str, Any]) -> None:
    path.write_text(json.dumps(entries, indent=2, sort_keys=True), encoding="utf-8")
