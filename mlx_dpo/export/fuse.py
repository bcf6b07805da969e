"""Fuse a run's adapters into a plain model, and measure how much training the model retains."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_dpo.adapters.hf_checkpoint import HFCheckpoint, local_checkpoint
from mlx_dpo.adapters.merge import MergeRetention, merge_adapters
from mlx_dpo.errors import ConfigError
from mlx_dpo.export.gguf import check_output_file, find_gguf_converter, write_gguf
from mlx_dpo.export.model_folder import merged_tensors, set_config_dtype, write_hf, write_mlx
from mlx_dpo.export.options import FuseOptions
from mlx_dpo.export.retention import SMALL_MARGIN, Retention, RetentionMeter, check_retention
from mlx_dpo.hub.model_card import make_fused_model_card
from mlx_dpo.models.device import main_dtype
from mlx_dpo.models.files import weight_bytes
from mlx_dpo.models.license import CARD, inherited_metadata, read_card_metadata
from mlx_dpo.models.load import LoadedModel, load_lazy_model, load_model
from mlx_dpo.models.output_folder import check_output_folder, disk_errors, new_output_folder
from mlx_dpo.models.quantize import DEFAULT_GROUP_SIZE, expected_bytes, quantize_model
from mlx_dpo.phases import phase
from mlx_dpo.runs.folder import hub_model_id
from mlx_dpo.saved_runs.evaluate import load_held_out_pairs, load_named_pairs
from mlx_dpo.saved_runs.open import OpenRun, open_run, unfinished_note
from mlx_dpo.units import format_items


@dataclass(frozen=True)
class FusedModel:
    """A fused model on disk, and how much of the training the model retains."""

    output: Path
    bytes: int  # of the weights
    kind: str  # dtype, or bits
    measured_on: str
    retention: Retention
    merge_retention: MergeRetention | None
    notes: tuple[str, ...]
    meter: RetentionMeter  # to measure what is made of this model


def fuse_run(folder: str, output: Path, options: FuseOptions) -> FusedModel:
    """Fuse the policy of a run into a plain model, and write it to the folder `output`.

    The output folder is written complete or not at all.

    Raises:
        ConfigError: an option contradicts the model, or there are no pairs to measure on.
        ModelError: too little of the training is retained and `force` is not set; or the model
            cannot be fused or written.
        RunError, DataError: the run, its model or its pairs cannot be read.
    """
    if options.gguf is not None:
        find_gguf_converter(options.converter)
        check_output_file(options.gguf)
    opened = open_run(folder)
    base, pairs, name, notes = (
        load_held_out_pairs(opened)
        if options.pairs is None
        else load_named_pairs(opened, options.pairs)
    )
    if not pairs:
        raise ConfigError(
            f"{folder}: the run has no held-out pairs to measure on; name pairs with --pairs"
        )
    checkpoint = _find_checkpoint(base, options)
    dtype = options.dtype or _stored_dtype(base, opened)
    size = _expected_bytes(base, options, dtype, checkpoint)
    check_output_folder(output, size)
    meter = RetentionMeter.of_run(opened, base, pairs)
    with ExitStack() as stack:
        partial = stack.enter_context(new_output_folder(output))
        with phase("Merging the adapter"), disk_errors(output):
            merge_retention, quantization_notes = _write(partial, base, options, dtype, checkpoint)
            license = inherited_metadata(read_card_metadata(base.path))
            page = make_fused_model_card(
                hub_model_id(opened.record), to=options.to, bits=options.bits, inherited=license
            )
            (partial / CARD).write_text(f"{page}\n", encoding="utf-8")
        del base  # one model is held at a time
        written = load_model(str(partial), trust_remote_code=opened.config.trust_remote_code)
        retention = meter.measure(written)
        if not options.force:
            check_retention(
                output,
                retention,
                min_retained=options.min_retained,
                advice=_advice(retention, options),
            )
        size = weight_bytes(partial)
    notes = (*notes, *quantization_notes, *([] if opened.finished else [unfinished_note(opened)]))
    kind = (
        f"{options.bits} bits"
        if options.bits
        else dtype
        if checkpoint is None
        else "types as before"
    )
    return FusedModel(
        output, size, kind, format_items(len(pairs), name), retention, merge_retention, notes, meter
    )


def convert_to_gguf(fused: FusedModel, options: FuseOptions) -> None:
    """Convert a fused Hugging Face checkpoint to the GGUF file `options.gguf`; keep the checkpoint.

    Raises:
        ConfigError: llama.cpp's converter is not found.
        ModelError: the converter fails.
    """
    assert options.gguf is not None
    with phase(f"Writing {options.gguf}"):
        write_gguf(find_gguf_converter(options.converter), fused.output, options.gguf)


def _find_checkpoint(base: LoadedModel, options: FuseOptions) -> HFCheckpoint | None:
    if options.to == "mlx":
        return None
    folder = base.path if options.base is None else Path(options.base).expanduser()
    return local_checkpoint(folder, options.base or base.source)


def _stored_dtype(base: LoadedModel, opened: OpenRun) -> str:
    """Return the dtype of the model's weights on disk, or the run's setting `dtype` if it is set.

    The dtype in memory can differ, because the CPU backend casts the weights.
    """
    config = opened.config
    if config.dtype is not None:
        return config.dtype
    model, _ = load_lazy_model(base.path, base.source, trust_remote_code=config.trust_remote_code)
    return main_dtype(model)


def _expected_bytes(
    base: LoadedModel, options: FuseOptions, dtype: str, checkpoint: HFCheckpoint | None
) -> int:
    if checkpoint is not None and checkpoint.folder is not None:
        return weight_bytes(checkpoint.folder)
    return expected_bytes(base.model, options.bits, options.group_size or DEFAULT_GROUP_SIZE, dtype)


def _write(
    partial: Path,
    base: LoadedModel,
    options: FuseOptions,
    dtype: str,
    checkpoint: HFCheckpoint | None,
) -> tuple[MergeRetention | None, tuple[str, ...]]:
    """Write the fused model to the folder `partial`.

    Returns:
        How much of the adapters' change remains after merging, and notes on unquantized layers.
    """
    if checkpoint is not None:
        write_hf(partial, merged_tensors(base.model, base.config, checkpoint), checkpoint)
        return None, ()
    merge_retention = merge_adapters(base.model, getattr(mx, dtype), options.quantization)
    entries = set_config_dtype(base.config, dtype)
    notes: tuple[str, ...] = ()
    if options.bits is not None:
        entries, notes = quantize_model(base.model, entries, options.bits, options.group_size)
    write_mlx(partial, base.model, entries, base.path)
    return merge_retention, notes


def _advice(retention: Retention, options: FuseOptions) -> str:
    """Return what the user can do if the fused model retains too little or too much."""
    if options.to == "hf":
        return "check that the checkpoint is the one that was trained"
    if abs(retention.margin_before) < SMALL_MARGIN:
        return (
            f"training hardly moved it (a margin of {retention.margin_before:.1g} nats): train on"
        )
    return "leave out `--bits`, or use more bits" if options.bits else "use a wider `--dtype`"
