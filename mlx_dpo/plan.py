"""What a run is going to need, as it is said before anything large is loaded."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.data.batching import count_micro_batches, largest_micro_batch, padded_row_tokens
from mlx_dpo.data.columns import lengths_only, longest_pairs, row_lengths
from mlx_dpo.data.tokenization.cache import RowProgress
from mlx_dpo.errors import ModelError
from mlx_dpo.generation.generate import context_length
from mlx_dpo.models.empty_weights import load_empty_model
from mlx_dpo.models.load import LoadedModel
from mlx_dpo.profiling import memory
from mlx_dpo.profiling.flops import TokenCounts, count_attended_keys, model_flops
from mlx_dpo.profiling.layer_subset import LayersNotFoundError, sample_layers, with_layers
from mlx_dpo.profiling.memory import MemoryBudget, available_memory, mac_memory
from mlx_dpo.profiling.profile import (
    PassProfile,
    ProfilePoint,
    fit_memory_curve,
    largest_that_fits,
    profile_inference_pass,
    shorten_pairs,
)
from mlx_dpo.runs.auto_batch_size import (
    MicroBatchFit,
    fit_micro_batch_size,
    longest_micro_batch,
    profile_micro_batch,
)
from mlx_dpo.runs.build import (
    attach_adapters,
    choose_scorer,
    inference_limit,
    make_dataset_scorer,
    optimizer_state_bytes,
    reference_mode,
)
from mlx_dpo.runs.inputs import Inputs, load_configured_base, load_inputs, no_progress
from mlx_dpo.scoring.kernels.gated_delta import use_fused_gated_delta
from mlx_dpo.scoring.select_scorer import ScorerChoice
from mlx_dpo.types import TokenizedPair


@dataclass(frozen=True)
class RowLengths:
    """Tokens of the longer row of a pair."""

    median: int
    most: int  # nine in ten have no more
    longest: int


@dataclass(frozen=True)
class MemoryParts:
    """Memory of a training step, in bytes; they add up to it."""

    weights: int
    adapters: int  # with gradient and moments
    activations: int  # what the blocks keep
    head: int  # logits, and what does not grow with the blocks


@dataclass(frozen=True)
class Capacity:
    """What fits into the memory there is."""

    pairs: int  # as long as the longest, in one pass
    tokens: int  # of a pair that is alone
    context: bool  # as many as the model places


@dataclass(frozen=True)
class EpochEstimate:
    """One pass over the training pairs."""

    steps: int
    passes: int
    tokens: int  # through the blocks
    whole_rows: int  # tokens that whole rows would need
    rows: int  # through the head
    operations: int
    seconds: float
    reference_operations: int  # the same pairs, and those held out
    reference_seconds: float


@dataclass(frozen=True)
class RunEstimate:
    """All of it."""

    inputs: Inputs
    choice: ScorerChoice
    fitted: MicroBatchFit
    lengths: RowLengths
    parameters: int
    parts: MemoryParts
    reference: int  # bytes at the peak of the reference pass
    without: Capacity  # without recomputation
    recomputed: Capacity
    epoch: EpochEstimate

    def to_dict(self) -> dict[str, Any]:
        """Plain values; bytes, tokens, operations and seconds."""
        fitted = self.fitted
        return {
            "model": self.inputs.base.source,
            "parameters": self.parameters,
            "pairs": len(self.inputs.train),
            "held_out": len(self.inputs.valid),
            "lengths": asdict(self.lengths),
            "scorer": self.choice.name,
            "memory": {
                **asdict(self.parts),
                "training": fitted.bytes,
                "reference": self.reference,
                "available": fitted.room.bytes,
                "available_is": fitted.room.what,
            },
            "most": {"stored": asdict(self.without), "recomputed": asdict(self.recomputed)},
            "chosen": {**fitted.settled(), "fits": fitted.fits},
            "epoch": asdict(self.epoch),
        }


Pairs = Sequence[TokenizedPair]
SHORT_SHARE = 0.5  # of the longest pair: the second point of the curves
MAX_PAIRS = 1024
MAX_TOKENS = 2**20  # where a model does not say how many it places


def estimate_run(
    config: DPOConfig, *, mac: str | None = None, rows: RowProgress = no_progress
) -> RunEstimate:
    """Rehearse a run of these settings; `mac` is the memory of a Mac to plan for.

    Many `rows` are counted as they become tokens.

    Raises:
        ConfigError, DataError, ModelError: as a run would.
    """
    room = available_memory() if mac is None else mac_memory(mac)
    inputs = load_inputs(
        config, read=partial(load_configured_base, load=load_empty_model), counting=rows
    )
    with use_fused_gated_delta(inputs.base.model):
        attach_adapters(inputs.base, config)
        choice = _select_scorer(inputs.base, config)
        return _RunEstimator(inputs, config, choice, room).forecast()


def _select_scorer(base: LoadedModel, config: DPOConfig) -> ScorerChoice:
    """The scorer, found on a few blocks; on all of them if the model does not run on those."""
    try:
        with with_layers(base.model, sample_layers(base.model).large):
            mx.eval(base.model.parameters())
            return choose_scorer(base, config)
    except (LayersNotFoundError, ModelError):
        mx.eval(base.model.parameters())
        return choose_scorer(base, config)


class _RunEstimator:
    """The rehearsals that a forecast is made of: a long pass and a short one, both ways."""

    def __init__(
        self, inputs: Inputs, config: DPOConfig, choice: ScorerChoice, room: MemoryBudget
    ) -> None:
        self.inputs, self.choice, self.room = inputs, choice, room
        self.base, self.model = inputs.base, inputs.base.model
        self.fitted = fit_micro_batch_size(
            self.base, config, choice, inputs.train, room=room, measure=True
        )
        self.config = self.fitted.config
        self.state = optimizer_state_bytes(self.model, config)
        self.longest = longest_micro_batch(self.config, choice, inputs.train)
        self.short = shorten_pairs(self.longest[:1], SHORT_SHARE)

    def forecast(self) -> RunEstimate:
        """Everything."""
        curves = {again: self._curve(recompute=again) for again in (False, True)}
        chosen = curves[bool(self.config.recompute)]
        reference, asked = self._reference()
        return RunEstimate(
            inputs=self.inputs,
            choice=self.choice,
            fitted=self.fitted,
            lengths=_row_lengths(self.inputs.train),
            parameters=memory.base_parameters(self.model),
            parts=self._parts(chosen[0].cost),
            reference=memory.parameter_bytes(self.model) + reference.bytes,
            without=self._most(*curves[False]),
            recomputed=self._most(*curves[True]),
            epoch=self._epoch(*chosen, reference, asked),
        )

    def _curve(self, *, recompute: bool) -> tuple[ProfilePoint, ProfilePoint]:
        settings = replace(self.config, recompute=recompute)
        known = self.fitted.cost if recompute == self.config.recompute else None
        long = known or profile_micro_batch(self.base, settings, self.choice, self.longest)
        short = profile_micro_batch(self.base, settings, self.choice, self.short)
        return self._sized(long, self.longest), self._sized(short, self.short)

    def _sized(self, cost: PassProfile, pairs: Pairs) -> ProfilePoint:
        return ProfilePoint(cost, len(pairs), self._trunk([pairs]) / len(pairs))

    def _reference(self) -> tuple[PassProfile, Pairs]:
        """What the largest pass without gradients costs, and the pairs in it."""
        limit, score = inference_limit(self.config, self.choice), self._score
        longest = longest_pairs(MAX_PAIRS, self.inputs.train, self.inputs.valid)
        asked = largest_micro_batch(longest, limit, cost=self.choice.cost)
        return profile_inference_pass(
            self.model, asked, score, memory=available_memory().bytes
        ), asked

    def _score(self, pairs: Pairs) -> object:
        with reference_mode(self.model, self.config):
            return make_dataset_scorer(self.config, self.choice)(self.model, pairs)

    def _parts(self, cost: PassProfile) -> MemoryParts:
        trained = memory.trainable_bytes(self.model)
        weights = memory.parameter_bytes(self.model) - trained
        adapters = memory.TRAINING_COPIES * trained + self.state
        rest = max(0, self.fitted.bytes - weights - adapters)
        head = min(rest, max(0, int(cost.outside.bytes)))
        return MemoryParts(weights, adapters, rest - head, head)

    def _most(self, long: ProfilePoint, short: ProfilePoint) -> Capacity:
        curve = fit_memory_curve(long, short)
        free = self.room.bytes - memory.resident_bytes(self.model, self.state)
        row = len(self.longest[0]) / long.tokens  # of a pair's tokens, those of its longer row
        context = context_length(self.base.config) or MAX_TOKENS
        tokens = largest_that_fits(lambda n: curve.bytes(1, n / row) <= free, most=context)
        pairs = largest_that_fits(lambda n: curve.bytes(n, long.tokens) <= free, most=MAX_PAIRS)
        return Capacity(pairs, tokens, tokens == context)

    def _epoch(
        self, long: ProfilePoint, short: ProfilePoint, reference: PassProfile, asked: Pairs
    ) -> EpochEstimate:
        config, train, valid = self.config, self.inputs.train, self.inputs.valid
        passes = partial(
            count_micro_batches,
            train,
            config.pass_limit,
            batch_size=config.batch_size,
            seed=config.seed,
        )
        found = passes(cost=self.choice.cost)
        work = model_flops(self.model, self.base.config, vocab_size=self.base.vocab_size)
        training = partial(work.training, recompute=bool(config.recompute))
        scoring = partial(work.forward, adapted=False)
        tokens = self._tokens(lengths_only(train), found.tokens.total)
        both = [pair for pairs in (train, valid) for pair in lengths_only(pairs)]
        every = scoring(self._tokens(both, self._trunk([pair] for pair in both)))
        every *= config.needs_reference
        ahead = config.passes_ahead * work.forward(tokens, adapted=True)
        a_second = scoring(self._tokens(asked, self._trunk([asked]))) / reference.seconds
        points = [
            (training(self._tokens(pairs, self._trunk([pairs]))), sized.cost.seconds)
            for pairs, sized in ((self.short, short), (self.longest, long))
        ]
        return EpochEstimate(
            steps=found.steps,
            passes=found.passes,
            tokens=tokens.trunk,
            whole_rows=passes(cost=padded_row_tokens).tokens.total,
            rows=tokens.head,
            operations=training(tokens) + ahead,
            seconds=extrapolate_seconds(
                points[0], points[1], passes=found.passes, operations=training(tokens)
            )
            + ahead / a_second,
            reference_operations=every,
            reference_seconds=every / a_second,
        )

    def _trunk(self, passes: Iterable[Pairs]) -> int:
        return sum(self.choice.cost(pairs).total for pairs in passes)

    def _tokens(self, pairs: Pairs, trunk: int) -> TokenCounts:
        shared = self.choice.name == "shared"
        rows = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs) if shared else trunk
        return TokenCounts(trunk, rows, count_attended_keys(pairs, shared=shared))


Point = tuple[int, float]  # operations and seconds of a pass


def extrapolate_seconds(short: Point, long: Point, *, passes: int, operations: int) -> float:
    """Seconds of so many passes with so many operations in all: a line through two of them."""
    more = long[0] - short[0]
    rate = (long[1] - short[1]) / more if more > 0 else 0.0
    start = short[1] - rate * short[0]
    if rate <= 0 or start < 0:  # noise; in proportion, then
        rate, start = long[1] / long[0], 0.0
    return start * passes + rate * operations


def _row_lengths(pairs: Pairs) -> RowLengths:
    rows = row_lengths(pairs)
    median, most = np.percentile(rows, [50, 90], method="higher")
    return RowLengths(int(median), int(most), int(rows.max()))
