"""Small tokenizers of transformers with the templates in `templates/` and their special tokens."""

from functools import lru_cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).parent / "templates"
DEEPSEEK = (
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", ["<｜User｜>", "<｜Assistant｜>"],
)  # fmt: skip
# BOS token (or None), stop token, and other special tokens.
TEMPLATES = {
    "llama-3": ("<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "chatml": (None, "<|im_end|>", ["<|im_start|>"]),
    "qwen-2.5": (None, "<|im_end|>", ["<|im_start|>", "<|endoftext|>"]),
    "qwen-3": (None, "<|im_end|>", ["<|im_start|>", "<|endoftext|>"]),
    "gemma": ("<bos>", "<end_of_turn>", ["<start_of_turn>", "<eos>"]),
    "mistral": ("<s>", "</s>", ["[INST]", "[/INST]"]),
    "phi-3": ("<s>", "<|end|>", ["<|user|>", "<|assistant|>", "<|system|>"]),
    "smollm": ("<|im_start|>", "<|im_end|>", ["<|endoftext|>"]),
    "zephyr": ("<s>", "</s>", []),
    "deepseek": DEEPSEEK,
    "deepseek-r1": DEEPSEEK,
    "granite": (None, "<|end_of_text|>", ["<|start_of_role|>", "<|end_of_role|>"]),
}  # fmt: skip
THINKING_TOKENS = ["<think>", "</think>"]  # added tokens that are not special


@lru_cache
def byte_level(name):
    """Return a byte-level BPE tokenizer like that of GPT-2, with few merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", letter) for letter in "abcdefghijklmnopqrstuvwxyz"]
    words = [*alphabet, *("".join(merge) for merge in merges)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _add_special_tokens(tokenizer, name)


@lru_cache
def metaspace(name):
    """Return a BPE tokenizer like that of Llama 2, which adds a space before a text."""
    begin, end, others = TEMPLATES[name]
    specials = ["<unk>", *(token for token in (begin, end, *others) if token)]
    letters = [chr(i) for i in range(33, 127)]
    words = [*specials, *(f"<0x{i:02X}>" for i in range(256)), "▁", *letters]
    merges = [("▁", letter) for letter in letters if letter.isalpha()]
    words += ["".join(merge) for merge in merges]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _add_special_tokens(tokenizer, name)


@lru_cache
def unigram(name):
    """Return a unigram tokenizer, in which special tokens have scores like other pieces."""
    begin, end, others = TEMPLATES[name]
    specials = ["<unk>", *(token for token in (begin, end, *others) if token)]
    pieces = [(token, 0.0) for token in specials]
    pieces += [(chr(i), -5.0) for i in range(33, 127)] + [
        ("▁", -4.0),
        ("｜", -5.0),
        ("\n", -5.0),
        ("▁a", -3.0),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, 0))
    tokenizer.normalizer = normalizers.Replace(Regex(" "), "▁")
    tokenizer.decoder = decoders.Replace("▁", " ")
    return _add_special_tokens(tokenizer, name)


def _add_special_tokens(tokenizer, name):
    begin, end, others = TEMPLATES[name]
    special = [token for token in (begin, end, *others) if token]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(THINKING_TOKENS)
    if begin:
        tokenizer.post_processor = TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token=end,
        chat_template=(FOLDER / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n"),
        clean_up_tokenization_spaces=False,
    )
