"""Pairs as text that every trainer turns into the same token ids, and the tokenizer for it.

Completions end with the stop token's own text: trainers that add one find it there, and those
that add none train on it too. Nothing is a chat template's business, and nothing begins a row.
"""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mlx_dpo.data.sources import read_rows
from mlx_dpo.errors import BadPairError, DataError
from mlx_dpo.schemas import parse_pairs

END, PAD = "<|end|>", "<|pad|>"
LONG_PROMPT, LONG_COMPLETION = (900, 1000), (200, 300)  # tokens, drawn evenly
SEED = 0


class TextPair(TypedDict):
    """A pair as every trainer reads it from a JSONL file."""

    prompt: str
    chosen: str
    rejected: str


def read_pairs(path: Path) -> tuple[list[TextPair], int]:
    """The pairs of a file as plain text, and how many rows were passed over as faulty."""
    pairs: list[TextPair] = []
    faulty = 0
    for row in read_rows(path):
        try:
            [pair] = parse_pairs(row)
        except BadPairError:
            faulty += 1
            continue
        texts = [pair.prompt, pair.chosen, pair.rejected]
        if not all(isinstance(text, str) for text in texts):
            raise DataError(f"{row.location}: holds messages; the benchmark takes plain text")
        prompt, chosen, rejected = (str(text) for text in texts)
        if not prompt.strip():
            faulty += 1
            continue
        pairs.append(TextPair(prompt=prompt, chosen=chosen + END, rejected=rejected + END))
    return pairs, faulty


def train_tokenizer(pairs: Sequence[TextPair], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of at most `vocabulary` entries, learned from the pairs themselves."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for pair in pairs for text in pair.values()), trainer)
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """The files from which transformers and mlx-lm load it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    ids = {"eos": tokenizer.token_to_id(END), "pad": tokenizer.token_to_id(PAD)}
    (folder / "special_ids.json").write_text(json.dumps(ids) + "\n")


def single_words(pairs: Sequence[TextPair], tokenizer: Tokenizer) -> Iterator[str]:
    """The words of the pairs that are one token each, with their space, round and round.

    Texts made of them have exactly as many tokens as words, wherever they are cut.
    """
    words = [f" {word}" for pair in pairs for text in pair.values() for word in text.split()]
    single = {word for word in set(words) if len(tokenizer.encode(word).ids) == 1}
    kept = [word for word in words if word in single and END not in word]
    if not kept:
        raise DataError("the pairs hold no word that is one token; give more text")
    while True:
        yield from kept


def synthesise(words: Iterator[str], prompt: int, chosen: int, rejected: int) -> TextPair:
    """A pair of exactly these many tokens, stop tokens included."""

    def take(count: int) -> str:
        return "".join(next(words) for _ in range(count))

    return TextPair(
        prompt=take(prompt),
        chosen=take(chosen - 1) + END,
        rejected=take(rejected - 1) + END,
    )


def long_pairs(pairs: Sequence[TextPair], tokenizer: Tokenizer, count: int) -> list[TextPair]:
    """Pairs of long prompts and completions out of the words of the short ones."""
    draw = random.Random(SEED)
    words = single_words(pairs, tokenizer)
    return [
        synthesise(
            words,
            draw.randint(*LONG_PROMPT),
            draw.randint(*LONG_COMPLETION),
            draw.randint(*LONG_COMPLETION),
        )
        for _ in range(count)
    ]


def write_pairs(path: Path, pairs: Sequence[TextPair]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
