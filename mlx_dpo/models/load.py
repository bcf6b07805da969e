"""Load a base model and its tokenizer with mlx-lm, checking files first and explaining errors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub.errors import StrictDataclassError
from mlx_lm import utils as mlx_lm
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from mlx_dpo.distributed.ranks import Ranks
from mlx_dpo.errors import ConfigError, ModelError, reason
from mlx_dpo.io.atomic import is_temporary
from mlx_dpo.models.device import cast_model, is_cpu, prepare_for_cpu
from mlx_dpo.models.download import resolve_model
from mlx_dpo.models.files import (
    REMOTE_CODE_REFUSED,
    check_model_folder,
    glob_safe,
    read_json,
)
from mlx_dpo.models.quantize import quantize_model
from mlx_dpo.models.rope import rope_notes, rope_overrides
from mlx_dpo.models.sharded.shard_model import shard_model
from mlx_dpo.phases import phase
from mlx_dpo.units import format_bytes

# Errors of mlx-lm and MLX for invalid files: wrong tensors, values, keys or bytes.
LOADING_ERRORS = (ValueError, RuntimeError, TypeError, KeyError, OSError)
# Errors of mlx-lm and transformers for values of types that they do not expect in their files.
LIBRARY_ERRORS = (
    *LOADING_ERRORS,
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    StrictDataclassError,
)
# Parts of messages about dtypes and quantization modes that this version of MLX does not know.
NEWER_MLX = ("unsupported dtype", "Cannot infer the quantization mode", "Invalid quantization mode")
# Files from which `tokenizer.json` can be made, and the libraries that this takes.
SLOW_TOKENIZERS = {"tokenizer.model": "sentencepiece", "tiktoken.model": "tiktoken"}
UPDATE = "the file may need a newer {}; update that library, or download the file again"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


# Rows are checked against the model's context; transformers would warn of every long text.
NO_LENGTH_LIMIT = 10**9


# Takes a model with lazy weights; returns the ranks to shard it over, or None to load it whole.
ChooseRanks = Callable[[nn.Module], Ranks | None]


@dataclass(frozen=True)
class LoadedModel:
    """A frozen model in evaluation mode, in the dtype that suits the device, and its tokenizer."""

    model: nn.Module
    tokenizer: TokenizerWrapper
    config: dict[str, Any]
    path: Path  # the local folder
    source: str  # as the user named it
    vocab_size: int  # rows of the embedding; ids at or above it must not reach the model
    notes: tuple[str, ...]  # what changes results: casts and quantization as asked, and fallbacks
    storage_notes: tuple[str, ...] = ()  # how memory holds the weights; the results are the same


def load_model(
    source: str,
    *,
    revision: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    shard_over: ChooseRanks = lambda model: None,
) -> LoadedModel:
    """Load a model and its tokenizer; `source` is the model's folder or Hub id.

    `bits` quantizes the weights, `dtype` casts them. On the CPU backend, all weights are then
    dequantized and cast to `dtype`, by default float32. The model is frozen and in evaluation mode.

    Args:
        shard_over: chooses ranks, each of which then holds a part of the weights of the blocks.

    Raises:
        ModelError: the model cannot be found or read, or its files contradict each other.
        ConfigError: a setting contradicts the model, or has no effect on it.
    """
    if group_size is not None and bits is None:
        raise ConfigError("`group_size` has no effect without `bits`; the model is not quantized")
    path = resolve_model(source, revision=revision, trust_remote_code=trust_remote_code)
    shown = "that was just written" if is_temporary(path) else source
    with phase(f"Loading model {shown}"):
        return _load_from_folder(
            path,
            source,
            bits=bits,
            group_size=group_size,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            shard_over=shard_over,
        )


def _load_from_folder(
    path: Path,
    source: str,
    *,
    bits: int | None,
    group_size: int | None,
    dtype: str | None,
    trust_remote_code: bool,
    shard_over: ChooseRanks,
) -> LoadedModel:
    """Load the model in the folder `path` as `load_model` says."""
    entries = check_model_folder(path, source, trust_remote_code=trust_remote_code)
    notes = (*rope_notes(entries, source), *tokenizer_notes(path))
    tokenizer = load_tokenizer(path, source, trust_remote_code=trust_remote_code)
    model, config = load_lazy_model(path, source, trust_remote_code=trust_remote_code)
    with loading_errors(source):
        if dtype is not None:
            cast_model(model, getattr(mx, dtype))
            notes += (f"weights cast to {dtype}, as asked",)
        if bits is not None:
            config, quantization_notes = quantize_model(model, config, bits, group_size)
            notes += (f"weights quantized to {bits} bits, as asked", *quantization_notes)
        storage_notes = _store_weights(model, getattr(mx, dtype or "float32"), shard_over(model))
        mx.eval(model.parameters())
    model.freeze()
    model.eval()
    vocab_size = embedding_size(model, config)
    return LoadedModel(model, tokenizer, config, path, source, vocab_size, notes, storage_notes)


def _store_weights(model: nn.Module, cpu_dtype: mx.Dtype, ranks: Ranks | None) -> tuple[str, ...]:
    """Bring the lazy weights into the form in which this device and this rank hold them.

    Args:
        cpu_dtype: dtype on the CPU backend.
        ranks: ranks to shard the model over; None holds it whole.

    Returns:
        Notes for the user.
    """
    notes: list[str] = []

    def prepare(part: nn.Module) -> None:
        if is_cpu():
            notes.extend(prepare_for_cpu(part, cpu_dtype))

    if ranks is None:
        prepare(model)
        return tuple(notes)
    shards = shard_model(model, ranks, prepare)
    prepare(model)
    held, total = shards.held_bytes, shards.held_bytes + shards.absent_bytes
    text = f"each of {ranks.size} ranks holds {format_bytes(held)} of {format_bytes(total)}"
    notes.append(f"{text} of the weights of the blocks, which are gathered block by block")
    return tuple(dict.fromkeys(notes))


def load_lazy_model(
    path: Path, source: str, *, trust_remote_code: bool
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model in the folder `path` with lazy weights, and the model's configuration.

    Call `check_model_folder` for the folder first.

    Raises:
        ModelError: weights and configuration contradict each other, or cannot be read.
    """
    entries = mlx_lm.load_config(path)
    advice = "download its files again"
    if "quantization" not in entries and "quantization_config" in entries:
        method = entries["quantization_config"].get("quant_method")
        advice = (
            f"weights quantized with `{method}` may need a newer mlx-lm; update mlx-lm, or use the "
            "unquantized model"
        )
    with (
        loading_errors(source, advice=advice, errors=LIBRARY_ERRORS),
        glob_safe(path) as folder,
    ):
        model, config = mlx_lm.load_model(
            folder,
            lazy=True,
            model_config=rope_overrides(entries, source),
            trust_remote_code=trust_remote_code,
        )
    # MLX is lazy: this computes nothing, but a value of the wrong type in the configuration fails.
    with loading_errors(source, "its configuration does not fit", errors=LIBRARY_ERRORS):
        model(mx.zeros((1, 1), mx.int32))
    return model, config


def load_tokenizer(path: Path, source: str, *, trust_remote_code: bool) -> TokenizerWrapper:
    """Load the tokenizer in the folder `path`, with the end tokens that the model's config names.

    Raises:
        ModelError: the files cannot be read, or are Python code that is not trusted.
    """
    where = f"{source}: tokenizer"
    with loading_errors(where, errors=LIBRARY_ERRORS):
        try:
            return mlx_lm.load_tokenizer(
                path,
                {"trust_remote_code": trust_remote_code, "model_max_length": NO_LENGTH_LIMIT},
                eos_token_ids=mlx_lm.load_config(path).get("eos_token_id"),
            )
        except Exception as error:
            if (message := _tokenizer_message(error, path, trust_remote_code)) is not None:
                raise ModelError(f"{where}: {message}") from error
            raise


def _tokenizer_message(error: Exception, path: Path, trust_remote_code: bool) -> str | None:
    """Return what is wrong with the tokenizer's files, or None if `error` itself says it."""
    if type(error) is Exception:  # the tokenizers library, written in Rust, raises no other class
        known = f"tokenizers {version('tokenizers')}"
        advice = UPDATE.format("tokenizers library")
        return f"`{TOKENIZER}` cannot be read by {known} ({reason(error)}); {advice}"
    if not trust_remote_code and "trust_remote_code" in str(error):
        return REMOTE_CODE_REFUSED
    if (path / TOKENIZER).is_file():
        return None
    missing = f"there is no `{TOKENIZER}`"
    for name, library in SLOW_TOKENIZERS.items():
        if (path / name).is_file():
            if find_spec(library) is None:
                return f"{missing}; copy it from the original model, or install `{library}`"
            advice = f"download it again, or copy `{TOKENIZER}` from the original model"
            return f"{missing}, and `{name}` cannot be read ({reason(error)}); {advice}"
    return f"{missing}; copy it from the original model"


def tokenizer_notes(path: Path) -> tuple[str, ...]:
    """Return a note for the user if the tokenizer's class is unknown to transformers.

    Transformers then uses `tokenizer.json` alone, without what the class would do differently.
    """
    if not (path / TOKENIZER_CONFIG).is_file():
        return ()
    entries = read_json(path / TOKENIZER_CONFIG, TOKENIZER_CONFIG)
    name = entries.get("tokenizer_class")
    if not isinstance(name, str) or "auto_map" in entries or tokenizer_class_from_name(name):
        return ()
    return (
        f"tokenizer class `{name}` is unknown to transformers {version('transformers')}: "
        f"`{TOKENIZER}` is loaded without that class",
    )


@contextmanager
def loading_errors(
    where: str,
    what: str = "cannot be read",
    advice: str = "download its files again",
    *,
    errors: tuple[type[Exception], ...] = LOADING_ERRORS,
) -> Iterator[None]:
    """Convert errors of mlx-lm and MLX inside the `with` block to a one-line `ModelError`.

    The message is put together from the arguments: `where: what (the error); advice`.

    Args:
        errors: Classes of the errors that the libraries raise in this block.
    """
    try:
        yield
    except errors as error:
        message = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, KeyError):
            message = f"no entry {message}"
        if isinstance(error, RuntimeError) and "malloc" in message:
            advice = "it does not fit into memory: use a smaller model, or fewer `bits`"
        if any(text in message for text in NEWER_MLX):
            advice = UPDATE.format(f"MLX than {version('mlx')}")
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
