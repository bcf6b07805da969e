"""Load a base model and its tokenizer with mlx-lm, checking files first and explaining errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import utils as mlx_lm
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_dpo.errors import ConfigError, ModelError
from mlx_dpo.models.device import cast_model, is_cpu, prepare_for_cpu
from mlx_dpo.models.download import resolve_model
from mlx_dpo.models.files import (
    REMOTE_CODE_REFUSED,
    check_model_folder,
    glob_safe,
)
from mlx_dpo.models.quantize import quantize_model
from mlx_dpo.models.rope import rope_notes, rope_overrides

# Errors of mlx-lm and MLX for invalid files: wrong tensors, values, keys or bytes.
LOADING_ERRORS = (ValueError, RuntimeError, TypeError, KeyError, OSError)

NO_FAST_TOKENIZER = (
    "there is no `tokenizer.json`; copy it from the original model, "
    "or install `sentencepiece` and `tiktoken` to make do without"
)


# Rows are checked against the model's context; transformers would warn of every long text.
NO_LENGTH_LIMIT = 10**9


@dataclass(frozen=True)
class LoadedModel:
    """A frozen model in evaluation mode, in the dtype that suits the device, and its tokenizer."""

    model: nn.Module
    tokenizer: TokenizerWrapper
    config: dict[str, Any]
    path: Path  # the local folder
    source: str  # as the user named it
    vocab_size: int  # rows of the embedding; ids at or above it must not reach the model
    notes: tuple[str, ...]  # casts and quantization of the weights, for the user


def load_model(
    source: str,
    *,
    revision: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a model and its tokenizer; `source` is the model's folder or Hub id.

    `bits` quantizes the weights, `dtype` casts them. On the CPU backend, all weights are then
    dequantized and cast to `dtype`, by default float32. The model is frozen and in evaluation mode.

    Raises:
        ModelError: the model cannot be found or read, or its files contradict each other.
        ConfigError: a setting contradicts the model, or has no effect on it.
    """
    if group_size is not None and bits is None:
        raise ConfigError("`group_size` has no effect without `bits`; the model is not quantized")
    path = resolve_model(source, revision=revision, trust_remote_code=trust_remote_code)
    entries = check_model_folder(path, source, trust_remote_code=trust_remote_code)
    notes = rope_notes(entries, source)
    tokenizer = load_tokenizer(path, source, trust_remote_code=trust_remote_code)
    model, config = load_lazy_model(path, source, trust_remote_code=trust_remote_code)
    with loading_errors(source):
        if dtype is not None:
            cast_model(model, getattr(mx, dtype))
            notes += (f"weights cast to {dtype}, as asked",)
        if bits is not None:
            config, quantization_notes = quantize_model(model, config, bits, group_size)
            notes += (f"weights quantized to {bits} bits, as asked", *quantization_notes)
        if is_cpu():
            notes += prepare_for_cpu(model, getattr(mx, dtype or "float32"))
        mx.eval(model.parameters())
    model.freeze()
    model.eval()
    vocab_size = embedding_size(model, config)
    return LoadedModel(model, tokenizer, config, path, source, vocab_size, notes)


def load_lazy_model(
    path: Path, source: str, *, trust_remote_code: bool
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model in the folder `path` with lazy weights, and the model's configuration.

    Call `check_model_folder` for the folder first.

    Raises:
        ModelError: weights and configuration contradict each other, or cannot be read.
    """
    with loading_errors(source), glob_safe(path) as folder:
        model, config = mlx_lm.load_model(
            folder,
            lazy=True,
            model_config=rope_overrides(mlx_lm.load_config(path), source),
            trust_remote_code=trust_remote_code,
        )
    return model, config


def load_tokenizer(path: Path, source: str, *, trust_remote_code: bool) -> TokenizerWrapper:
    """Load the tokenizer in the folder `path`, with the end tokens that the model's config names.

    Raises:
        ModelError: the files cannot be read, or are Python code that is not trusted.
    """
    where = f"{source}: tokenizer"
    with loading_errors(where):
        try:
            return mlx_lm.load_tokenizer(
                path,
                {"trust_remote_code": trust_remote_code, "model_max_length": NO_LENGTH_LIMIT},
                eos_token_ids=mlx_lm.load_config(path).get("eos_token_id"),
            )
        except ValueError as error:
            if "sentencepiece" in str(error):
                raise ModelError(f"{where}: {NO_FAST_TOKENIZER}") from error
            if trust_remote_code or "trust_remote_code" not in str(error):
                raise
            raise ModelError(f"{where}: {REMOTE_CODE_REFUSED}") from error


@contextmanager
def loading_errors(
    where: str, what: str = "cannot be read", advice: str = "get its files again"
) -> Iterator[None]:
    """Convert errors of mlx-lm and MLX inside the `with` block to a one-line `ModelError`.

    The message is put together from the arguments: `where: what (the error); advice`.
    """
    try:
        yield
    except LOADING_ERRORS as error:
        message = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, KeyError):
            message = f"no entry {message}"
        if isinstance(error, RuntimeError) and "malloc" in message:
            advice = "it does not fit into memory: take a smaller model, or fewer `bits`"
        raise ModelError(f"{where}: {what} ({message}); {advice}") from error


def embedding_size(model: nn.Module, config: dict[str, Any]) -> int:
    """Return the number of rows of the token embedding.

    A model may have other embeddings (positions, n-grams). The token embedding is the smallest one
    that has a row for each token of the configured vocabulary.
    """
    text = config.get("text_config") or {}
    vocab = config.get("vocab_size") or text.get("vocab_size") or 0
    embeddings = (nn.Embedding, nn.QuantizedEmbedding)
    rows = [m.weight.shape[0] for m in model.modules() if isinstance(m, embeddings)]
    return min((n for n in rows if n >= vocab), default=vocab) if vocab else max(rows, default=0)
