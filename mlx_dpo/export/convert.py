"""Convert a model to MLX's layout, optionally quantized, and check the result.

mlx-lm does the conversion. This module checks the settings first, writes the output folder complete
or not at all, and compares log-probabilities of the result with those of the source.
"""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import ModelCardData
from mlx_lm import convert as mlx_convert

from mlx_dpo.errors import ModelError
from mlx_dpo.io.arrays import scalar
from mlx_dpo.models import load
from mlx_dpo.models.device import main_dtype
from mlx_dpo.models.download import is_hub_id, resolve_model
from mlx_dpo.models.files import (
    CONFIG,
    INDEX,
    check_model_folder,
    glob_safe,
    read_json,
    weight_bytes,
)
from mlx_dpo.models.license import CARD, copy_license_files, inherited_metadata, read_card_metadata
from mlx_dpo.models.load import LoadedModel
from mlx_dpo.models.output_folder import check_output_folder, disk_errors, new_output_folder
from mlx_dpo.models.quantize import (
    QuantizationConfig,
    check_quantizable,
    expected_bytes,
    make_quantization_config,
    quantizable_layers,
    unquantized_notes,
)
from mlx_dpo.models.rope import rope_overrides
from mlx_dpo.phases import phase
from mlx_dpo.scoring.logps import token_logps

SAMPLE_TEXT = (
    "Every morning the old ferry left the harbour at seven, and a small boy stood on the pier "
    "and waved. The captain once asked the baker about him. He waves because the boat always "
    "comes back, the baker said. After that, the captain waved too."
)

# Nats per token. The same dtype must give the same numbers; a narrower one rounds
# every weight, to 11 bits (float16) or 8 (bfloat16): small models here move by a thousandth
# and a hundredth, eight layers of random weights by ten times as much.
EXACT_TOLERANCE = 1e-4
ROUNDING_TOLERANCES = {"float32": EXACT_TOLERANCE, "float16": 0.05, "bfloat16": 0.3}
LARGE_ERROR = 0.5  # a quantized model this far off writes visibly worse


def sample_token_ids(base: LoadedModel) -> mx.array:
    """Return the token ids of `SAMPLE_TEXT`. (1, T) int32

    Ids beyond the model's vocabulary are replaced by its last id.
    """
    ids = base.tokenizer.encode(SAMPLE_TEXT)
    return mx.array([[min(i, base.vocab_size - 1) for i in ids]], dtype=mx.int32)


def mean_logp_difference(source: mx.array, converted: mx.array) -> float:
    """Return the mean absolute difference of two models' token log-probabilities, in nats.

    Raises:
        ModelError: a log-probability is not a number.
    """
    for name, logps in (("the source", source), ("the converted model", converted)):
        if not scalar(mx.isfinite(logps).all()):
            raise ModelError(
                f"{name} gives log-probabilities that are not finite; its weights are damaged or "
                "out of range for `dtype`"
            )
    return scalar(mx.abs(source - converted).mean())


def tolerance(source: str, converted: str) -> float:
    """Return how far log-probabilities may differ after a change of dtype, in nats per token.

    Args:
        source: Name of the dtype before the conversion.
        converted: Name of the dtype after the conversion.
    """
    return (
        EXACT_TOLERANCE
        if source == converted
        else max(ROUNDING_TOLERANCES[source], ROUNDING_TOLERANCES[converted])
    )


MAX_RECIPE_BITS = 6  # the largest number of bits in a recipe


@dataclass(frozen=True)
class ConvertReport:
    """The size of a converted model, and how far its log-probs differ from those of the source."""

    source: str
    output: Path
    bytes_before: int  # of the weight files
    bytes_after: int
    bits_per_weight: float
    conversion_error: float  # mean absolute difference of log-probabilities, nats per token
    tokens: int  # that the difference is a mean over
    notes: tuple[str, ...]  # on layers that are not quantized, and on an unexpected dtype


def convert(  # noqa: PLR0913 (one argument for each option of the command)
    source: str,
    output: Path,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    dtype: str | None = None,
    revision: str | None = None,
    recipe: str | None = None,
    trust_remote_code: bool = False,
) -> ConvertReport:
    """Convert a model, write the result to the folder `output`, and compare both models.

    `source` is the model's folder or Hub id. If an error is raised, `output` is not written.

    Raises:
        ConfigError: settings contradict each other or the model, or have no effect.
        ModelError: the source cannot be read, the output cannot be written, or the converted model
            differs from the source.
    """
    quantization = make_quantization_config(bits, group_size, mode, recipe, dtype)
    path = resolve_model(source, revision=revision, trust_remote_code=trust_remote_code)
    check_model_folder(path, source, trust_remote_code=trust_remote_code)
    model, config = load.load_lazy_model(path, source, trust_remote_code=trust_remote_code)
    if quantization.is_quantized:
        check_quantizable(model, config, quantization.group_size, quantization.group_sizes)
    check_output_folder(output, _expected_bytes(model, quantization))
    with new_output_folder(output) as partial:
        with (
            load.loading_errors(source, "cannot be converted", "choose other settings"),
            disk_errors(output),
        ):
            _write(path, partial, quantization, trust_remote_code)
            _write_metadata(path, partial, source, quantization)
        written, _ = load.load_lazy_model(partial, source, trust_remote_code=trust_remote_code)
        with phase("Comparing both models"):
            difference, tokens = _conversion_error(path, partial, trust_remote_code)
        if not quantization.is_quantized:
            _check_same_model(source, difference, main_dtype(model), main_dtype(written))
        return ConvertReport(
            source=source,
            output=output,
            bytes_before=weight_bytes(path),
            bytes_after=weight_bytes(partial),
            bits_per_weight=_bits_per_weight(partial),
            conversion_error=difference,
            tokens=tokens,
            notes=_notes(model, written, quantization, difference),
        )


def _expected_bytes(model: nn.Module, quantization: QuantizationConfig) -> int:
    bits = MAX_RECIPE_BITS if quantization.recipe else quantization.bits
    size, dtype = quantization.group_size, quantization.dtype
    return expected_bytes(model, bits, size, dtype, mode=quantization.mode)


def _write(
    path: Path, partial: Path, quantization: QuantizationConfig, trust_remote_code: bool
) -> None:
    partial.rmdir()  # mlx-lm insists on making the folder
    # mlx-lm prints its progress.
    title = "Quantizing" if quantization.is_quantized else "Converting"
    with phase(title), contextlib.redirect_stdout(io.StringIO()), glob_safe(path) as folder:
        mlx_convert(
            str(folder),
            str(partial),
            quantize=quantization.is_quantized,
            q_group_size=quantization.group_size,
            q_bits=quantization.bits,
            q_mode=quantization.mode,
            dtype=quantization.dtype,
            quant_predicate=quantization.recipe,
            trust_remote_code=trust_remote_code,
        )


def _write_metadata(
    path: Path, partial: Path, source: str, quantization: QuantizationConfig
) -> None:
    """Write `config.json`, model card and license files, without paths of this machine."""
    read = read_json(partial / CONFIG, CONFIG)
    config = read | rope_overrides(read, source)
    if quantization.dtype is not None:
        # mlx-lm casts by `torch_dtype` when it converts again.
        for entries in (config, config.get("text_config") or {}):
            for key in entries.keys() & {"torch_dtype", "dtype"}:
                entries[key] = quantization.dtype
    _write_text(partial / CONFIG, json.dumps(config, indent=4))
    known = inherited_metadata(read_card_metadata(path)) | (
        {"base_model": source} if is_hub_id(source) else {}
    )
    data = ModelCardData(library_name="mlx", pipeline_tag="text-generation", tags=["mlx"], **known)
    _write_text(partial / CARD, f"---\n{data.to_yaml()}\n---\n")
    copy_license_files(path, partial)


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def _conversion_error(path: Path, partial: Path, trust_remote_code: bool) -> tuple[float, int]:
    """Return how far the log-probs of source and converted model differ, and the number of tokens.

    The first value is the mean absolute difference in nats per token. Only one model is in memory
    at a time.
    """
    base = load.load_model(str(path), trust_remote_code=trust_remote_code)
    ids = sample_token_ids(base)
    before = token_logps(base.model, ids)
    mx.eval(before)  # the source is about to be freed
    del base
    base = load.load_model(str(partial), trust_remote_code=trust_remote_code)
    after = token_logps(base.model, ids)
    return mean_logp_difference(before, after), after.size


def _check_same_model(source: str, difference: float, stored: str, written: str) -> None:
    """Raise `ModelError` if an unquantized model differs from its source by more than rounding.

    Args:
        source: Name of the model for the error message.
        difference: Mean absolute difference of the log-probabilities.
        stored: Name of the source's dtype.
        written: Name of the converted model's dtype.
    """
    allowed = tolerance(stored, written)
    if difference > allowed:
        raise ModelError(
            f"{source}: the converted model differs too much from the source (log-probabilities "
            "differ by "
            f"{difference:.2g} nats per token, and {stored} to {written} explains {allowed:.2g}); "
            "no output was written"
        )


def _bits_per_weight(folder: Path) -> float:
    sizes = read_json(folder / INDEX, INDEX)["metadata"]
    return 8 * sizes["total_size"] / sizes["total_parameters"]


def _notes(
    before: nn.Module, after: nn.Module, quantization: QuantizationConfig, difference: float
) -> tuple[str, ...]:
    if quantization.is_quantized:
        notes = unquantized_notes(
            after,
            len(quantizable_layers(before)),
            quantization.group_size,
            quantization.group_sizes,
        )
        far = f"{difference:.2g} nats per token is a large change: use more bits or a smaller "
        "group size"
        return (*notes, far) if difference > LARGE_ERROR else notes
    stored, written = main_dtype(before), main_dtype(after)
    if quantization.dtype is None and stored != written:
        return (f"{stored} weights written in {written}, which `{CONFIG}` names as theirs",)
    return ()
