"""A run's policy written as a plain model, and held against itself as it was trained."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_dpo.adapters.hf_checkpoint import HFCheckpoint, local_checkpoint
from mlx_dpo.adapters.merge import AffineQuantization, RoundingLoss, merge_adapters
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
from mlx_dpo.saved_runs.evaluate import load_held_out_pairs, load_named_pairs
from mlx_dpo.saved_runs.export_peft import hub_id_of_run
from mlx_dpo.saved_runs.open import (
    OpenRun,
    load_adapter_into,
    load_reference_into,
    open_run,
    unfinished_note,
)
from mlx_dpo.scoring.score_pairs import score_pairs
from mlx_dpo.types import PairLogps, TokenizedPair

Values = np.ndarray  # (n,) float64


@dataclass(frozen=True)
class Retention:
    """A policy and its other form on the same pairs."""

    pairs: int
    margin_before: float  # mean over pairs of the log-ratio margin, nats
    margin_after: float
    margin: float  # the share that is left
    change: float  # share of the change of the completions' log-probabilities that is left
    apart: float  # mean absolute difference of the two's log-probabilities, nats a token

    @property
    def least(self) -> float:
        """The smaller share; of the margin only where there was one."""
        return min(self.margin, self.change) if self.margin_before > 0 else self.change


def measure_retention(
    pairs: Sequence[TokenizedPair], reference: PairLogps, policy: PairLogps, other: PairLogps
) -> Retention:
    """What `other` keeps of the way from `reference` to `policy`.

    The change that is left is projected on the whole one. Noise adds nothing to that on average,
    but much to a small change, up or down: a share far above one says as little as one below.
    """
    moved, left = _log_ratios(pairs, reference, policy), _log_ratios(pairs, reference, other)
    before, after = _margins(pairs, moved).mean(), _margins(pairs, left).mean()
    tokens = sum(map(sum, _token_counts(pairs)))
    size = float((moved * moved).sum())
    return Retention(
        pairs=len(pairs),
        margin_before=float(before),
        margin_after=float(after),
        margin=float(after / before) if before else 0.0,
        change=float((moved * left).sum()) / size if size else 0.0,
        apart=float(np.abs(moved - left).sum()) / tokens,
    )


def _is_labelled(pairs: Sequence[TokenizedPair]) -> bool:
    return pairs[0].desirable is not None


def _log_ratios(pairs: Sequence[TokenizedPair], start: PairLogps, end: PairLogps) -> Values:
    """Log-ratios of the completions that the pairs judge. (1 or 2, len(pairs))"""
    rows = [np.array(e) - np.array(s) for s, e in zip(start, end, strict=True)]
    return np.array(rows[:1] if _is_labelled(pairs) else rows, np.float64)


def _margins(pairs: Sequence[TokenizedPair], moved: Values) -> Values:
    if _is_labelled(pairs):
        return moved[0] * np.array([1.0 if pair.desirable else -1.0 for pair in pairs])
    return moved[0] - moved[1]


def _token_counts(pairs: Sequence[TokenizedPair]) -> list[tuple[int, ...]]:
    if _is_labelled(pairs):
        return [(len(pair.chosen),) for pair in pairs]
    return [(len(pair.chosen), len(pair.rejected)) for pair in pairs]


SMALL_MARGIN = 0.01  # nats of margin that rounding may well drown


@dataclass(frozen=True)
class FuseOptions:
    """What a fused model is to be.

    Raises:
        ConfigError: a wish has no effect beside the others.
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
        types = "with `--to hf`: every tensor keeps the type that it has in the checkpoint"
        for name, value, idle, why in (
            ("bits", self.bits, hf, "with `--to hf`: transformers cannot read MLX's packing"),
            ("dtype", self.dtype, hf, types),
            ("group-size", self.group_size, self.bits is None, "without `--bits`"),
            ("base", self.base, not hf, "without `--to hf`"),
            ("gguf", self.gguf, not hf, "without `--to hf`, from which it is made"),
            ("converter", self.converter, self.gguf is None, "without `--gguf`"),
        ):
            if value is not None and idle:
                raise ConfigError(f"`--{name}` has no effect {why}")

    @property
    def packed(self) -> AffineQuantization | None:
        """How weights are to be packed."""
        return (
            AffineQuantization(self.bits, self.group_size or DEFAULT_GROUP_SIZE)
            if self.bits
            else None
        )


@dataclass(frozen=True)
class FusedModel:
    """What was written, and how much of the training is in it."""

    output: Path
    bytes: int  # of the weights
    kind: str  # number type, or bits
    measured_on: str
    retention: Retention
    rounding: RoundingLoss | None
    notes: tuple[str, ...]


def fuse_run(folder: str, output: Path, wish: FuseOptions) -> FusedModel:
    """Write the policy of a run to the folder `output`, whole or not at all.

    Raises:
        ConfigError: a wish contradicts the model, or there are no pairs to measure on.
        ModelError: too little of the training is left and `force` is not set; or the model has
            no such form, or cannot be written.
        RunError, DataError: the run, its model or its pairs are at fault.
    """
    if wish.gguf is not None:
        find_gguf_converter(wish.converter)
        check_output_file(wish.gguf)
    opened = open_run(folder)
    base, pairs, name, notes = (
        load_held_out_pairs(opened) if wish.pairs is None else load_named_pairs(opened, wish.pairs)
    )
    if not pairs:
        raise ConfigError(
            f"{folder}: the run held no pairs out to measure on; name some with --pairs"
        )
    checkpoint = _find_checkpoint(base, wish)
    dtype = wish.dtype or _stored_dtype(base, opened)
    size = _expected_bytes(base, wish, dtype, checkpoint)
    check_output_folder(output, size)
    load_reference_into(opened, base)
    reference = _score(opened, base, pairs)
    load_adapter_into(opened, base)
    policy = _score(opened, base, pairs)
    with ExitStack() as stack:
        partial = stack.enter_context(new_output_folder(output))
        with disk_errors(output):
            rounding, left = _write(partial, base, wish, dtype, checkpoint)
            licence = inherited_metadata(read_card_metadata(base.path))
            page = make_fused_model_card(
                hub_id_of_run(opened), to=wish.to, bits=wish.bits, inherited=licence
            )
            (partial / CARD).write_text(f"{page}\n", encoding="utf-8")
        del base  # one model is held at a time
        written = load_model(str(partial), trust_remote_code=opened.config.trust_remote_code)
        found = measure_retention(pairs, reference, policy, _score(opened, written, pairs))
        _check_retention(output, found, wish)
        size = weight_bytes(partial)
    notes = (*notes, *left, *([] if opened.finished else [unfinished_note(opened)]))
    kind = f"{wish.bits} bits" if wish.bits else dtype if checkpoint is None else "types as before"
    return FusedModel(output, size, kind, f"{len(pairs):,} {name}", found, rounding, notes)


def convert_to_gguf(fused: FusedModel, wish: FuseOptions) -> None:
    """Write the file that is wished for beside a fused checkpoint, which stays as it is.

    Raises:
        ConfigError, ModelError: as `write_gguf`.
    """
    assert wish.gguf is not None
    write_gguf(find_gguf_converter(wish.converter), fused.output, wish.gguf)


def _find_checkpoint(base: LoadedModel, wish: FuseOptions) -> HFCheckpoint | None:
    if wish.to == "mlx":
        return None
    folder = base.path if wish.base is None else Path(wish.base).expanduser()
    return local_checkpoint(folder, wish.base or base.source)


def _stored_dtype(base: LoadedModel, opened: OpenRun) -> str:
    """The number type that the model computes in where it is not held for the CPU."""
    config = opened.config
    if config.dtype is not None:
        return config.dtype
    model, _ = load_lazy_model(base.path, base.source, trust_remote_code=config.trust_remote_code)
    return main_dtype(model)


def _expected_bytes(
    base: LoadedModel, wish: FuseOptions, dtype: str, checkpoint: HFCheckpoint | None
) -> int:
    if checkpoint is not None and checkpoint.folder is not None:
        return weight_bytes(checkpoint.folder)
    return expected_bytes(base.model, wish.bits, wish.group_size or DEFAULT_GROUP_SIZE, dtype)


def _score(opened: OpenRun, base: LoadedModel, pairs: Sequence[TokenizedPair]) -> PairLogps:
    """By whole rows, which is exact for every architecture. (len(pairs),) each"""
    return score_pairs(base.model, pairs, limit=opened.config.pass_limit)


def _write(
    partial: Path, base: LoadedModel, wish: FuseOptions, dtype: str, checkpoint: HFCheckpoint | None
) -> tuple[RoundingLoss | None, tuple[str, ...]]:
    """Write the model; what rounding left of the weights' change, and notes on layers."""
    if checkpoint is not None:
        write_hf(partial, merged_tensors(base.model, base.config, checkpoint), checkpoint)
        return None, ()
    rounding = merge_adapters(base.model, getattr(mx, dtype), wish.packed)
    entries = set_config_dtype(base.config, dtype)
    left: tuple[str, ...] = ()
    if wish.bits is not None:
        entries, left = quantize_model(base.model, entries, wish.bits, wish.group_size)
    write_mlx(partial, base.model, entries, base.path)
    return rounding, left


def _check_retention(output: Path, found: Retention, wish: FuseOptions) -> None:
    """Refuse less than was asked for, and as much more: an adapter that goes in twice doubles."""
    most = 2 - wish.min_retained
    if (wish.min_retained <= found.least and found.change <= most) or wish.force:
        return
    advice = "leave `--bits` out, or take more" if wish.bits else "take a wider `--dtype`"
    if wish.to == "hf":
        advice = "see that the checkpoint is the one that was trained on"
    elif abs(found.margin_before) < SMALL_MARGIN:
        advice = f"training hardly moved it (a margin of {found.margin_before:.1g} nats): train on"
    bound = f"less than `--min-retained` {wish.min_retained:g}"
    if found.least >= wish.min_retained:
        bound = f"which is beyond {most:.0%}"
    raise ModelError(
        f"{output}: the fused model keeps {found.margin:.1%} of the margin and {found.change:.1%} "
        f"of the adapters' change of log-probabilities, {bound}, so it was not written; {advice}, "
        "keep the adapter beside the model, or --force"
    )
