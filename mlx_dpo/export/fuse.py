"""Fuse a run's adapters into a plain model, and measure how much training the model retains."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_dpo.adapters.hf_checkpoint import HFCheckpoint, local_checkpoint
from mlx_dpo.adapters.merge import AffineQuantization, MergeRetention, merge_adapters
from mlx_dpo.errors import ConfigError, ModelError
from mlx_dpo.export.model_folder import (
    check_output_file,
    find_gguf_converter,
    merged_tensors,
    set_config_dtype,
    write_gguf,
    write_hf,
    write_mlx,
)
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
from mlx_dpo.saved_runs.open import (
    OpenRun,
    load_adapter_into,
    load_reference_into,
    open_run,
    unfinished_note,
)
from mlx_dpo.scoring.generation_match import use_generating_function
from mlx_dpo.scoring.score_pairs import score_pairs
from mlx_dpo.types import PairLogps, TokenizedPair
from mlx_dpo.units import format_items

Values = np.ndarray  # (n,) float64


@dataclass(frozen=True)
class Retention:
    """How much of the training a fused model retains, measured on preference pairs."""

    pairs: int
    margin_before: float  # mean over pairs of the log-ratio margin, nats
    margin_after: float
    margin: float  # retained share of the margin
    change: float  # retained share of the change of the completions' log-probabilities
    mean_difference: float  # of log-probabilities, absolute, nats per token

    @property
    def minimum(self) -> float:
        """The smaller of the shares of margin and log-prob change that are left after fusing.

        If the margin of the policy is not positive, only `change` counts.
        """
        return min(self.margin, self.change) if self.margin_before > 0 else self.change

    @property
    def maximum(self) -> float:
        """The larger of these shares; if the policy's margin is not positive, that of `change`."""
        return max(self.margin, self.change) if self.margin_before > 0 else self.change


def measure_retention(
    pairs: Sequence[TokenizedPair], reference: PairLogps, policy: PairLogps, fused: PairLogps
) -> Retention:
    """Measure how much of the policy's change of log-probabilities the fused model retains.

    The fused model's change from the reference is projected on the policy's change. Noise averages
    out in this projection. If the policy's change is small, noise can still dominate, so that a
    share far above 1 is as bad as a share far below 1.

    Args:
        reference: Log-probabilities of the pairs under the reference model.
        policy: Log-probabilities of the pairs under the policy, before fusing.
        fused: Log-probabilities of the pairs under the fused model.
    """
    policy_ratios, fused_ratios = (
        _log_ratios(pairs, reference, policy),
        _log_ratios(pairs, reference, fused),
    )
    before, after = _margins(pairs, policy_ratios).mean(), _margins(pairs, fused_ratios).mean()
    tokens = sum(map(sum, _token_counts(pairs)))
    size = float((policy_ratios * policy_ratios).sum())
    return Retention(
        pairs=len(pairs),
        margin_before=float(before),
        margin_after=float(after),
        margin=float(after / before) if before else 0.0,
        change=float((policy_ratios * fused_ratios).sum()) / size if size else 0.0,
        mean_difference=float(np.abs(policy_ratios - fused_ratios).sum()) / tokens,
    )


def _is_labelled(pairs: Sequence[TokenizedPair]) -> bool:
    return pairs[0].desirable is not None


def _log_ratios(pairs: Sequence[TokenizedPair], start: PairLogps, end: PairLogps) -> Values:
    """Return the log-ratio of each completion, `end` minus `start`. (1 or 2, len(pairs))

    A preference pair has two completions (chosen and rejected), an unpaired example has one.
    """
    rows = [np.array(e) - np.array(s) for s, e in zip(start, end, strict=True)]
    return np.array(rows[:1] if _is_labelled(pairs) else rows, np.float64)


def _margins(pairs: Sequence[TokenizedPair], ratios: Values) -> Values:
    if _is_labelled(pairs):
        return ratios[0] * np.array([1.0 if pair.desirable else -1.0 for pair in pairs])
    return ratios[0] - ratios[1]


def _token_counts(pairs: Sequence[TokenizedPair]) -> list[tuple[int, ...]]:
    if _is_labelled(pairs):
        return [(len(pair.chosen),) for pair in pairs]
    return [(len(pair.chosen), len(pair.rejected)) for pair in pairs]


SMALL_MARGIN = 0.01  # nats; rounding may be larger than such a margin


@dataclass(frozen=True)
class FuseOptions:
    """Options of the command `fuse`.

    Raises:
        ConfigError: an option has no effect in combination with the other options.
    """

    to: str = "mlx"  # or "hf"
    bits: int | None = None
    group_size: int | None = None
    dtype: str | None = None
    base: str | None = None  # the folder of the Hugging Face checkpoint
    pairs: str | None = None
    min_retained: float = 0.9
    force: bool = False
    gguf: Path | None = None
    converter: str | None = None

    def __post_init__(self) -> None:
        hf = self.to == "hf"
        types = "with `--to hf`: every tensor keeps its dtype in the checkpoint"
        for name, value, idle, why in (
            (
                "bits",
                self.bits,
                hf,
                "with `--to hf`: transformers cannot read MLX's quantized weights",
            ),
            ("dtype", self.dtype, hf, types),
            ("group-size", self.group_size, self.bits is None, "without `--bits`"),
            ("base-model", self.base, not hf, "without `--to hf`"),
            (
                "gguf",
                self.gguf,
                not hf,
                "without `--to hf`, because GGUF is converted from that checkpoint",
            ),
            ("converter", self.converter, self.gguf is None, "without `--gguf`"),
        ):
            if value is not None and idle:
                raise ConfigError(f"`--{name}` has no effect {why}")

    @property
    def quantization(self) -> AffineQuantization | None:
        """Quantization of the fused model's weights; None if they are not quantized."""
        return (
            AffineQuantization(self.bits, self.group_size or DEFAULT_GROUP_SIZE)
            if self.bits
            else None
        )


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
    load_reference_into(opened, base)
    reference = _pair_logps(opened, base, pairs)
    load_adapter_into(opened, base)
    policy = _pair_logps(opened, base, pairs)
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
        retention = measure_retention(pairs, reference, policy, _pair_logps(opened, written, pairs))
        _check_retention(output, retention, options)
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
        output, size, kind, format_items(len(pairs), name), retention, merge_retention, notes
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


def _pair_logps(opened: OpenRun, base: LoadedModel, pairs: Sequence[TokenizedPair]) -> PairLogps:
    """Return the log-probabilities of the completions in `pairs` under a model. (len(pairs),) each

    Each prompt with one completion is computed as one padded sequence, which is exact for every
    architecture.
    """
    use_generating_function(
        base.model, vocab_size=base.vocab_size, max_length=opened.config.length_limit
    )
    with phase("Scoring pairs", len(pairs), unit=opened.config.unit) as advance:
        return score_pairs(base.model, pairs, limit=opened.config.pass_limit, progress=advance)


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


def _check_retention(output: Path, retention: Retention, options: FuseOptions) -> None:
    """Raise `ModelError` if the fused model retains too little or too much of the training.

    The retained shares have to be at least `min_retained` and at most 2 - `min_retained`. An
    adapter that was merged twice, for example, gives a share of 2. With `force`, nothing is
    checked.
    """
    most = 2 - options.min_retained
    is_within = options.min_retained <= retention.minimum and retention.maximum <= most
    if is_within or options.force:
        return
    advice = "leave out `--bits`, or use more bits" if options.bits else "use a wider `--dtype`"
    if options.to == "hf":
        advice = "check that the checkpoint is the one that was trained"
    elif abs(retention.margin_before) < SMALL_MARGIN:
        advice = (
            f"training hardly moved it (a margin of {retention.margin_before:.1g} nats): train on"
        )
    bound = f"less than `--min-retained` {options.min_retained:g}"
    if retention.minimum >= options.min_retained:
        bound = f"which is beyond {most:.0%}"
    raise ModelError(
        f"{output}: the fused model keeps {retention.margin:.1%} of the margin and "
        f"{retention.change:.1%} of the adapters' change of log-probabilities, {bound}, so it "
        f"was not written; {advice}, keep the adapter next to the model, or --force"
    )
