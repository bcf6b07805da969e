"""Build models with the right shapes and dtypes, without reading or allocating weights.

MLX allocates an array when it is first used. The weights of the whole model can therefore be
counted, and some of its blocks run, while the checkpoint stays on disk or on the Hub.
"""

import io
from contextlib import redirect_stdout
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import utils as mlx_lm

from mlx_dpo.errors import ConfigError, ModelError
from mlx_dpo.models.device import cast_model, dtype_name, is_cpu
from mlx_dpo.models.download import resolve_model
from mlx_dpo.models.files import check_config, check_tokenizer
from mlx_dpo.models.load import (
    LIBRARY_ERRORS,
    LoadedModel,
    embedding_size,
    load_tokenizer,
    loading_errors,
    tokenizer_notes,
)
from mlx_dpo.models.quantize import (
    AFFINE_GROUP_SIZES,
    DEFAULT_GROUP_SIZE,
    check_quantizable,
    expected_bytes,
    unfit_notes,
)
from mlx_dpo.units import format_bytes

# Quantization methods of other libraries, and the settings that mlx-lm converts them to.
QUANT_METHODS: dict[str, dict[str, Any]] = {
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
}
OWN_SIZE_METHODS = ("awq", "gptq")  # the configuration states the sizes
# mlx-lm builds these with an LM head, and removes it if the checkpoint has no weights for it.
WITH_REMOVABLE_HEAD = ("gemma3", "gemma3_text", "recurrent_gemma")
DEFAULT_DTYPE = "float32"  # if a configuration states no dtype


def load_empty_model(
    source: str,
    *,
    revision: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a model like `load_model`, but neither read nor allocate the model's weights.

    Only the configuration and the tokenizer are downloaded from the Hub.

    Raises:
        ModelError: the model cannot be found, or mlx-lm cannot build it.
        ConfigError: a setting contradicts the model, or has no effect on it.
    """
    if group_size is not None and bits is None:
        raise ConfigError("`group_size` has no effect without `bits`; the model is not quantized")
    path = resolve_model(
        source, revision=revision, trust_remote_code=trust_remote_code, weights=False
    )
    config = check_config(path, source, trust_remote_code=trust_remote_code)
    check_tokenizer(path, source)
    if "model_file" in config:
        raise ModelError(
            f"{source}: `{config['model_file']}` is the model's own code, which `plan` does not "
            "run; `train` prints the memory that it needs"
        )
    with loading_errors(source, errors=LIBRARY_ERRORS):
        model = build_model(config)
        remove_tied_head(model, config)
    with loading_errors(source):
        unfit: tuple[str, ...] = ()
        if bits is not None:
            check_quantizable(model, config, group_size or DEFAULT_GROUP_SIZE, AFFINE_GROUP_SIZES)
            unfit = unfit_notes(model, group_size or DEFAULT_GROUP_SIZE)
        packing = _quantization(config, bits, group_size)
        notes = (*_cast_and_quantize(model, config, packing, dtype), *unfit)
    model.freeze()
    model.eval()
    tokenizer = load_tokenizer(path, source, trust_remote_code=trust_remote_code)
    return LoadedModel(
        model,
        tokenizer,
        config,
        path,
        source,
        embedding_size(model, config),
        (*notes, *tokenizer_notes(path)),
    )


def build_model(config: dict[str, Any]) -> nn.Module:
    """Build the model that a `config.json` with the content `config` describes.

    The weights are random and lazy: they are allocated when they are first used.
    """
    # mlx-lm's loaders look for weights first; this is the function by which they find a class.
    kind, arguments = mlx_lm._get_classes(config)
    with redirect_stdout(io.StringIO()):
        model: nn.Module = kind(arguments.from_dict(config))
    return model


def remove_tied_head(model: nn.Module, config: dict[str, Any]) -> None:
    """Remove an LM head that the checkpoint does not have, as mlx-lm does when it reads weights."""
    text = config.get("text_config") or config
    is_tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", True))
    if is_tied and config.get("model_type") in WITH_REMOVABLE_HEAD:
        language_model: Any = getattr(model, "language_model", model)
        language_model.sanitize({})


def _quantization(
    config: dict[str, Any], bits: int | None, group_size: int | None
) -> dict[str, Any] | None:
    """Return the model's quantization settings, or None if the model is not quantized.

    The settings are `group_size` and `bits`, and for each layer that differs an entry with the
    layer's name.
    """
    if bits is not None:
        return {"group_size": group_size or DEFAULT_GROUP_SIZE, "bits": bits}
    if configured := config.get("quantization"):
        return dict(configured)
    other = (config.get("text_config") or config).get("quantization_config") or {}
    method = str(other.get("quant_method"))
    if method in OWN_SIZE_METHODS:
        return {"group_size": other["group_size"], "bits": other["bits"]}
    return QUANT_METHODS.get(method)


def _cast_and_quantize(
    model: nn.Module, config: dict[str, Any], packing: dict[str, Any] | None, dtype: str | None
) -> tuple[str, ...]:
    """Cast and quantize weights as `load_model` does on this device; return notes for the user.

    `packing` contains the quantization settings; None means no quantization.
    """
    configured = config | (config.get("text_config") or {})
    stored = str(configured.get("torch_dtype") or configured.get("dtype") or DEFAULT_DTYPE)
    wanted = dtype or (stored.removeprefix("torch."))
    if not is_cpu():
        cast_model(model, getattr(mx, wanted))
        if packing:
            _quantize(model, packing)
        return ()
    wide = getattr(mx, dtype or "float32")
    if not packing and wanted == dtype_name(wide):
        cast_model(model, wide)
        return ()
    group, width = (
        (packing or {}).get("group_size", DEFAULT_GROUP_SIZE),
        (packing or {}).get("bits"),
    )
    mode = (packing or {}).get("mode", "affine")
    on_gpu = expected_bytes(model, width, group, wanted, mode=mode)
    cast_model(model, wide)
    how = f"packed in {width} bits" if width else f"in {wanted}"
    return (
        f"converted to {dtype_name(wide)} for the CPU backend; on a Mac's GPU {how}, "
        + format_bytes(on_gpu, is_estimate=True),
    )


def _quantize(model: nn.Module, packing: dict[str, Any]) -> None:
    def layer_settings(path: str, module: nn.Module) -> Any:
        if path in packing:
            return packing[path]
        fits = hasattr(module, "to_quantized")
        return fits and module.weight.shape[-1] % packing["group_size"] == 0

    nn.quantize(
        model,
        group_size=packing["group_size"],
        bits=packing["bits"],
        mode=packing.get("mode", "affine"),
        class_predicate=layer_settings,
    )
