"""Pairs that every trainer tokenizes to the same ids, and the tokenizer for them.

Completions end with the text of the stop token: trainers that add one find it there, and those
that do not train on it too. There is no chat template and no beginning-of-sequence token.
"""

import json
import random
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import TypedDict

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mlx_dpo.data.sources import read_rows
from mlx_dpo.errors import BadPairError, DataError
from mlx_dpo.schemas import parse_pairs

END_TOKEN, PAD_TOKEN = "<|end|>", "<|pad|>"
# Numbers of tokens, uniformly distributed.
LONG_PROMPT, LONG_COMPLETION = (900, 1000), (200, 300)
RANKED_PROMPT, RANKED_COMPLETION, RANKED_COMPLETIONS = (80, 120), (30, 60), 4
SYSTEM_PROMPT, AFTER_SYSTEM = 600, (40, 60)
SEED = 0


class TextPair(TypedDict):
    """A pair in the JSONL format that every trainer reads."""

    prompt: str
    chosen: str
    rejected: str


def read_pairs(path: Path) -> tuple[list[TextPair], int]:
    """Return the pairs of a file as plain text, and the number of faulty rows skipped."""
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
        pairs.append(
            TextPair(prompt=prompt, chosen=chosen + END_TOKEN, rejected=rejected + END_TOKEN)
        )
    return pairs, faulty


def train_tokenizer(pairs: Sequence[TextPair], vocabulary: int) -> Tokenizer:
    """Train a byte-level BPE of at most `vocabulary` entries on the pairs."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_TOKEN, PAD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for pair in pairs for text in pair.values()), trainer)
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write the files from which transformers and mlx-lm load the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_TOKEN,
        "pad_token": PAD_TOKEN,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    ids = {"eos": tokenizer.token_to_id(END_TOKEN), "pad": tokenizer.token_to_id(PAD_TOKEN)}
    (folder / "special_ids.json").write_text(json.dumps(ids) + "\n")


def single_words(pairs: Sequence[TextPair], tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the words of the pairs that are a single token with their space, repeated forever.

    A text of such words has exactly as many tokens as words.
    """
    words = [f" {word}" for pair in pairs for text in pair.values() for word in text.split()]
    single = {word for word in set(words) if len(tokenizer.encode(word).ids) == 1}
    usable = [word for word in words if word in single and END_TOKEN not in word]
    if not usable:
        raise DataError("the pairs hold no word that is one token; give more text")
    while True:
        yield from usable


def synthesize_pair(words: Iterator[str], prompt: int, chosen: int, rejected: int) -> TextPair:
    """Return a pair of exactly so many tokens, including the stop tokens."""
    return TextPair(
        prompt=_take(words, prompt),
        chosen=_take(words, chosen - 1) + END_TOKEN,
        rejected=_take(words, rejected - 1) + END_TOKEN,
    )


def _take(words: Iterator[str], count: int) -> str:
    """Return a text of the next `count` words."""
    return "".join(next(words) for _ in range(count))


def long_pairs(pairs: Sequence[TextPair], tokenizer: Tokenizer, count: int) -> list[TextPair]:
    """Return pairs of long prompts and completions, made of the words of `pairs`."""
    draw = random.Random(SEED)
    words = single_words(pairs, tokenizer)
    return [
        synthesize_pair(
            words,
            draw.randint(*LONG_PROMPT),
            draw.randint(*LONG_COMPLETION),
            draw.randint(*LONG_COMPLETION),
        )
        for _ in range(count)
    ]


def ranked_pairs(pairs: Sequence[TextPair], tokenizer: Tokenizer, count: int) -> list[TextPair]:
    """Return all pairs of several completions per prompt, made of the words of `pairs`.

    The pairs of a prompt follow each other; the last prompt may have fewer.
    """
    draw = random.Random(SEED)
    words = single_words(pairs, tokenizer)
    ranked: list[TextPair] = []
    while len(ranked) < count:
        prompt = _take(words, draw.randint(*RANKED_PROMPT))
        completions = [
            _take(words, draw.randint(*RANKED_COMPLETION) - 1) + END_TOKEN
            for _ in range(RANKED_COMPLETIONS)
        ]
        ranked += [
            TextPair(prompt=prompt, chosen=better, rejected=worse)
            for better, worse in combinations(completions, 2)
        ]
    return ranked[:count]


def system_prompt_pairs(
    pairs: Sequence[TextPair], tokenizer: Tokenizer, count: int
) -> list[TextPair]:
    """Return pairs whose prompts begin with one long text, made of the words of `pairs`."""
    draw = random.Random(SEED)
    words = single_words(pairs, tokenizer)
    system = _take(words, SYSTEM_PROMPT)
    found = []
    for _ in range(count):
        pair = synthesize_pair(words, *(draw.randint(*AFTER_SYSTEM) for _ in range(3)))
        found.append(TextPair({**pair, "prompt": system + pair["prompt"]}))
    return found


# Pairs that are made from the words of the file, by the kind of benchmark.
SYNTHETIC_KINDS = {"long": long_pairs, "ranked": ranked_pairs, "system": system_prompt_pairs}


def write_pairs(path: Path, pairs: Sequence[TextPair]) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
