"""Perplexity of base and aligned model on plain text: does the model still know the language?

For the scored tokens x_i of all documents, with N tokens in B bytes of UTF-8,

    perplexity per token = exp(-(1/N) sum_i log p(x_i | tokens before x_i in its window))
    perplexity per byte  = exp(-(1/B) sum_i log p(x_i | ...))
    bits per byte        = -(1/B) sum_i log2 p(x_i | ...)

Numbers per token compare models with the same tokenizer only; numbers per byte compare all models.
Each document is scored on its own. If the tokenizer begins texts with a special token, all tokens
after it are scored. Otherwise a document's first token has no context, and neither the token nor
its bytes count.

A document longer than a window is scored in windows that move by `stride` tokens: each token is
scored once, in the first window that holds it, with at least window - stride tokens of context
(fewer only in the document's first window).

Source: the strided perplexity of Hugging Face transformers ("Perplexity of fixed-length models").
"""

import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mlx_dpo.adapters.switch import AdapterState
from mlx_dpo.data.sources import resolve_source
from mlx_dpo.errors import ConfigError, DataError
from mlx_dpo.evaluation.measurements.measurement import Measure
from mlx_dpo.generation.context import context_length
from mlx_dpo.generation.prompt import encode_text
from mlx_dpo.io.bounded import read_text
from mlx_dpo.phases import phase
from mlx_dpo.saved_runs.open import SwitchableModel
from mlx_dpo.scoring.sequence_logps import ScoredSequence, sequence_logps

MAX_WINDOW = 2048  # tokens of a window by default, if the context is longer
TEXT_FILES = (".txt", ".md", ".text", ".rst", "")  # suffixes of files that are one document
STATES: tuple[AdapterState, ...] = ("base", "aligned")
REPLACEMENT = "\ufffd"  # what an incomplete character is decoded to
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Windows(NamedTuple):
    """The window and the stride of a perplexity, in tokens; None for the default."""

    window: int | None = None
    stride: int | None = None

    def fit(self, context: int | None) -> tuple[int, int]:
        """Return window and stride for a model with this context length.

        Raises:
            ConfigError: the window is beyond the context, or the stride leaves no context.
        """
        window = self.window or min(MAX_WINDOW, context or MAX_WINDOW)
        if context is not None and window > context:
            raise ConfigError(
                f"`window` is {window:,} tokens, but the model's context is {context:,}; "
                f"use --window {context}"
            )
        stride = self.stride or window // 2
        if stride >= window:
            raise ConfigError(
                f"`stride` is {stride:,} tokens, but must be below the window of {window:,} "
                "tokens: the first token of a window needs one before it; lower --stride"
            )
        return window, stride


@dataclass(frozen=True)
class Perplexity:
    """Perplexities of one model on a set of documents."""

    nats: float  # summed negative log-probs
    tokens: int
    num_bytes: int

    def to_dict(self) -> dict[str, float]:
        """Return perplexities per token and per byte, and bits per byte."""
        per_byte = self.nats / self.num_bytes
        return {
            "token_perplexity": safe_exp(self.nats / self.tokens),
            "byte_perplexity": safe_exp(per_byte),
            "bits_per_byte": per_byte / math.log(2),
        }


@dataclass(frozen=True)
class PerplexityMeasurement:
    """Perplexities of base and aligned model on the documents of one file."""

    subject: str
    settings: Mapping[str, Any]
    documents: int
    perplexities: Mapping[AdapterState, Perplexity]
    notes: tuple[str, ...]
    name: str = "perplexity"

    def to_dict(self) -> dict[str, Any]:
        """Return the perplexities of base and aligned model, and what they were measured on."""
        base = self.perplexities["base"]
        facts = {"of": self.subject, "documents": self.documents}
        facts |= {"tokens": base.tokens, "bytes": base.num_bytes}
        return facts | {state: value.to_dict() for state, value in self.perplexities.items()}


def safe_exp(value: float) -> float:
    """Return e^value, or the largest float if it is beyond: JSON has no infinity."""
    return math.exp(value) if value < 709 else sys.float_info.max


def prepare_perplexity(file: str, windows: Windows) -> Measure:
    """Read the documents of a file, and return what measures perplexities on them.

    A text file is one document. Rows of other files, of a folder or of a Hub dataset have a
    document each, in their field `text`.

    Raises:
        DataError: the file cannot be read, or has no text.
    """
    texts, dropped = read_documents(file)
    subject = Path(file).name or file

    def measure(model: SwitchableModel) -> PerplexityMeasurement:
        return measure_perplexity(model, texts, windows, subject=subject, dropped=dropped)

    return measure


def read_documents(file: str) -> tuple[list[str], int]:
    """Return the documents of a file, and the number of empty ones that were left out.

    Raises:
        DataError: the file cannot be read, a row has no text, or no document is left.
    """
    path = Path(file).expanduser()
    if path.suffix.lower() in TEXT_FILES and path.is_file():
        texts = [read_text(path, DataError)]
    else:
        texts = list(_row_texts(file))
    documents = [text for text in texts if text.strip()]
    if not documents:
        raise DataError(f"{file}: contains no text; name a file with text")
    return documents, len(texts) - len(documents)


def _row_texts(file: str) -> Iterator[str]:
    for row in resolve_source(file).rows():
        text = row.record.get("text")
        if not isinstance(text, str):
            found = "nothing" if "text" not in row.record else type(text).__name__
            raise DataError(
                f"{row.location}: `text` must be a document as text, found {found}; name a text "
                "file, or rows with `text`"
            )
        yield text


def measure_perplexity(
    model: SwitchableModel,
    texts: Sequence[str],
    windows: Windows,
    *,
    subject: str,
    dropped: int = 0,
) -> PerplexityMeasurement:
    """Return the perplexities of base and aligned model on texts, one document each.

    Raises:
        ConfigError: the window does not fit into the model's context.
        DataError: no token of the texts can be scored.
    """
    tokenizer = model.base.tokenizer
    window, stride = windows.fit(context_length(model.base.config))
    documents = [encode_text(tokenizer, text) for text in texts]
    scored = [(text, ids) for text, ids in zip(texts, documents, strict=True) if len(ids) > 1]
    if not scored:
        raise DataError(f"{subject}: no document has a token to score; name a longer text")
    sequences = [part for _, ids in scored for part in split_windows(ids, window, stride)]
    tokens = sum(len(ids) - 1 for _, ids in scored)
    num_bytes = sum(_scored_bytes(tokenizer, text, ids) for text, ids in scored)
    perplexities = {}
    for state in STATES:
        with (
            model.switch.activated(state),
            phase(f"Computing perplexity ({state})", len(sequences), unit="windows") as advance,
        ):
            logps = sequence_logps(model.base.model, sequences, progress=advance)
        perplexities[state] = Perplexity(-math.fsum(logps), tokens, num_bytes)
    notes = _notes(dropped + len(texts) - len(scored))
    settings = {"window": window, "stride": stride}
    return PerplexityMeasurement(subject, settings, len(scored), perplexities, notes)


def split_windows(ids: Sequence[int], window: int, stride: int) -> Iterator[ScoredSequence]:
    """Yield the windows of a document; together they score each token but the first, once."""
    scored = 1
    while scored < len(ids):
        end = min(window if scored == 1 else scored + stride, len(ids))
        begin = max(0, end - window)
        yield ScoredSequence(ids[begin:end], scored - begin)
        scored = end


def _scored_bytes(tokenizer: Any, text: str, ids: Sequence[int]) -> int:
    """Return the bytes of a document's scored tokens: all, or all but its first token's."""
    size = len(text.encode())
    if ids[0] == tokenizer.bos_token_id:
        return size
    return max(1, size - _token_bytes(tokenizer, ids[0]))


def _token_bytes(tokenizer: Any, token: int) -> int:
    """Return the bytes of a document's first token, which may be a part of a character."""
    text = tokenizer.decode([token])
    if REPLACEMENT not in text:
        return len(text.encode())
    # Such a token has a byte of its own, `<0xE7>`, or is written with one character per byte.
    piece = tokenizer.convert_ids_to_tokens(token)
    return 1 if BYTE_TOKEN.fullmatch(piece) else len(piece)


def _notes(dropped: int) -> tuple[str, ...]:
    if not dropped:
        return ()
    were = "was" if dropped == 1 else "were"
    return (f"{dropped:,} document{'s' * (dropped != 1)} without a token to score {were} left out",)
