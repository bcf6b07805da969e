"""Make random checkpoints in which some words are similar, as synonyms are in language models."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from scripts.studies.toy.words import Words

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
HEAD_LENGTH = 6.0  # length of a word's row in the LM head, as `write_checkpoint` draws it


def similar_vectors(
    draw: np.random.Generator, spreads: Sequence[float], dimensions: int
) -> np.ndarray:
    """Return unit vectors around a common random direction. (len(spreads), dimensions)

    Args:
        spreads: sine of the expected angle from the common direction; 1 is an independent vector.
    """
    shares = np.array(spreads)[:, None]
    noise = draw.normal(size=(len(spreads), dimensions))
    vectors = np.sqrt(1 - shares**2) * draw.normal(size=dimensions) + shares * noise
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def set_word_rows(
    folder: Path, vocabulary: Words, tensor: str, rows: Mapping[str, np.ndarray]
) -> None:
    """Replace words' rows in the LM head or the embeddings of a checkpoint."""
    path = str(folder / "model.safetensors")
    weights = dict(mx.load(path))
    values = np.array(weights[tensor])
    for word, row in rows.items():
        values[vocabulary.ids[word]] = row
    weights[tensor] = mx.array(values)
    mx.save_safetensors(path, weights, metadata={"format": "pt"})
