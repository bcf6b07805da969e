"""Estimate the memory, tokens, FLOPs and time of a training run without running it."""

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.data.batches.micro_batches import largest_micro_batch
from mlx_dpo.data.columns import row_lengths
from mlx_dpo.errors import ModelError
from mlx_dpo.generation.context import context_length
from mlx_dpo.models.empty_weights import load_empty_model
from mlx_dpo.models.load import LoadedModel
from mlx_dpo.phases import phase
from mlx_dpo.plan.epoch import MAX_PAIRS, EpochCounter, EpochEstimate, Pairs, TimedPairs
from mlx_dpo.plan.ranks import RanksEstimate, estimate_ranks, fit_ranks
from mlx_dpo.profiling import memory
from mlx_dpo.profiling.device_memory import MemoryBudget, available_memory, mac_memory
from mlx_dpo.profiling.extrapolate import (
    ProfilePoint,
    fit_memory_curve,
    largest_that_fits,
)
from mlx_dpo.profiling.layer_subset import LayersNotFoundError, choose_layer_subsets, with_layers
from mlx_dpo.profiling.profile import PassProfile, profile_inference_pass, shorten_pairs
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
    make_order,
    optimizer_state_bytes,
    reference_mode,
    with_grouping,
    with_learning_rate,
)
from mlx_dpo.runs.inputs import Inputs, load_inputs, load_trainable_base, with_max_length
from mlx_dpo.runs.reference import count_steps
from mlx_dpo.scoring.kernels.gated_delta import use_fused_gated_delta
from mlx_dpo.scoring.select_scorer import ScorerChoice

SHORT_SHARE = 0.5  # length of the second profiled pass, as a share of the longest pair
MAX_TOKENS = 2**20  # if the model has no context length

# The fields of the following three classes are keys of `mlx-dpo plan --json`.


@dataclass(frozen=True)
class RowLengths:
    """Median, 90th percentile and maximum length of the pairs, in tokens.

    The length of a pair is that of its prompt and its longer completion.
    """

    median: int
    most: int  # 90th percentile
    longest: int


@dataclass(frozen=True)
class MemoryParts:
    """Memory of a training step in bytes, divided into weights, adapters, activations and head."""

    weights: int
    adapters: int  # with gradients and optimizer state
    activations: int  # saved by the layers
    head: int  # logits and intermediate arrays, independent of the number of layers


@dataclass(frozen=True)
class Capacity:
    """Number of pairs in the largest micro-batch, and tokens of the longest pair, that fit."""

    pairs: int  # number of pairs per pass, each as long as the longest
    tokens: int  # length of a single pair
    context: bool  # whether `tokens` is the context length of the model


@dataclass(frozen=True)
class RunEstimate:
    """Estimate of the memory, tokens, FLOPs and time of a training run."""

    inputs: Inputs
    choice: ScorerChoice
    fitted: MicroBatchFit
    lengths: RowLengths
    parameters: int
    parts: MemoryParts
    reference_bytes: int  # peak of the reference pass
    without_recomputation: Capacity
    with_recomputation: Capacity
    epoch: EpochEstimate
    ranks: RanksEstimate | None = None  # if the run has several
    rate_reason: str = ""  # what the learning rate was chosen by; "" if it was given

    def to_dict(self) -> dict[str, Any]:
        """Return the estimate as values for JSON, in bytes, tokens, operations and seconds."""
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
                "reference": self.reference_bytes,
                "available": fitted.room.bytes,
                "available_is": fitted.room.description,
            },
            "most": {
                "stored": asdict(self.without_recomputation),
                "recomputed": asdict(self.with_recomputation),
            },
            "chosen": {**fitted.automatic_settings(), "fits": fitted.fits},
            "epoch": asdict(self.epoch),
            "ranks": None if self.ranks is None else self.ranks.to_dict(),
            "learning_rate": self.fitted.config.learning_rate,
        }


def estimate_run(
    config: DPOConfig,
    *,
    memory_size: str | None = None,
    ranks: int = 1,
) -> RunEstimate:
    """Estimate memory, work and time of a run with these settings.

    Args:
        memory_size: memory of a Mac to plan for, such as `16GB`; None plans for this machine.
        ranks: processes that share the run, each on a machine with this memory.

    Raises:
        ConfigError, DataError, ModelError: for the same reasons as the run itself.
    """
    budget = available_memory() if memory_size is None else mac_memory(memory_size)
    inputs = load_inputs(config, read=partial(load_trainable_base, load=load_empty_model))
    config = with_max_length(config, inputs.base)
    config, _ = with_grouping(config, inputs.train)
    with use_fused_gated_delta(inputs.base.model):
        attach_adapters(inputs.base, config)
        steps = count_steps(config, make_order(config, inputs.train))
        config, rate_reason = with_learning_rate(inputs, config, steps)
        choice = _select_scorer(inputs.base, config)
        with phase("Measuring a few layers"):
            estimate = _RunEstimator(inputs, config, choice, budget, ranks).estimate()
        return replace(estimate, rate_reason=rate_reason)


def _select_scorer(base: LoadedModel, config: DPOConfig) -> ScorerChoice:
    """Choose the function that computes the log-probs of pairs.

    The function is tested on a few layers of the model, or on the whole model if that fails.
    """
    try:
        with with_layers(base.model, choose_layer_subsets(base.model).large):
            mx.eval(base.model.parameters())
            return choose_scorer(base, config)
    except (LayersNotFoundError, ModelError):
        mx.eval(base.model.parameters())
        return choose_scorer(base, config)


class _RunEstimator:
    """Estimator of a run: it extrapolates from the measurements of a long and a short pass.

    Both passes are measured with and without gradient checkpointing.
    """

    def __init__(
        self,
        inputs: Inputs,
        config: DPOConfig,
        choice: ScorerChoice,
        budget: MemoryBudget,
        ranks: int,
    ) -> None:
        self.inputs, self.choice, self.budget, self.num_ranks = inputs, choice, budget, ranks
        self.base, self.model = inputs.base, inputs.base.model
        self.ranks_fit = fit_ranks(ranks, self.model, config, self._fit, budget)
        self.fitted = self.ranks_fit.fitted
        self.config = self.fitted.config
        self.optimizer_bytes = optimizer_state_bytes(self.model, config)
        self.longest = longest_micro_batch(self.config, choice, inputs.train)
        self.short = shorten_pairs(self.longest[:1], SHORT_SHARE)
        self.counter = EpochCounter(inputs, self.config, choice)

    def _fit(self, config: DPOConfig, room: MemoryBudget) -> MicroBatchFit:
        return fit_micro_batch_size(
            self.base, config, self.choice, self.inputs.train, room=room, measure=True
        )

    def estimate(self) -> RunEstimate:
        """Measure the passes and return the estimate of the run."""
        points = {recompute: self._profile(recompute=recompute) for recompute in (False, True)}
        long, short = points[bool(self.config.recompute)]
        reference, reference_pairs = self._profile_reference()
        epoch = self.counter.estimate(
            TimedPairs(self.short, short.profile.seconds),
            TimedPairs(self.longest, long.profile.seconds),
            TimedPairs(reference_pairs, reference.seconds),
        )
        return RunEstimate(
            inputs=self.inputs,
            choice=self.choice,
            fitted=self.fitted,
            lengths=_row_lengths(self.inputs.train),
            parameters=memory.base_parameters(self.model),
            parts=self._memory_parts(long.profile),
            reference_bytes=self._held_bytes() + reference.bytes,
            without_recomputation=self._capacity(*points[False]),
            with_recomputation=self._capacity(*points[True]),
            epoch=epoch,
            ranks=self._ranks(epoch),
        )

    def _profile(self, *, recompute: bool) -> tuple[ProfilePoint, ProfilePoint]:
        """Measure a pass over the longest pairs and a pass over short pairs; return both."""
        settings = replace(self.config, recompute=recompute)
        measured = self.fitted.cost if recompute == self.config.recompute else None
        long = measured or profile_micro_batch(self.base, settings, self.choice, self.longest)
        short = profile_micro_batch(self.base, settings, self.choice, self.short)
        return self._profile_point(long, self.longest), self._profile_point(short, self.short)

    def _profile_point(self, profile: PassProfile, pairs: Pairs) -> ProfilePoint:
        """Return the profile of a pass, with the number of its pairs and of tokens per pair."""
        return ProfilePoint(profile, len(pairs), self.counter.layer_tokens([pairs]) / len(pairs))

    def _profile_reference(self) -> tuple[PassProfile, Pairs]:
        """Return memory and time of the largest reference forward pass, and its pairs."""
        longest = self.counter.longest_reference_pairs
        limit = inference_limit(self.config, self.choice, longest)
        pairs = largest_micro_batch(longest, limit, cost=self.choice.cost)
        profile = profile_inference_pass(
            self.model, pairs, self._compute_reference_logps, memory=available_memory().bytes
        )
        return profile, pairs

    def _compute_reference_logps(self, pairs: Pairs) -> object:
        """Return the log-probs of `pairs` under the reference."""
        with reference_mode(self.model, self.config):
            return make_dataset_scorer(self.config, self.choice)(self.model, pairs)

    def _held_bytes(self) -> int:
        """Return the memory of the weights that a rank holds, with a whole block at a time."""
        return memory.parameter_bytes(self.model) - self.ranks_fit.absent

    def _ranks(self, epoch: EpochEstimate) -> RanksEstimate | None:
        """Estimate the run on several ranks; None for a single process."""
        if self.num_ranks == 1:
            return None
        return estimate_ranks(
            self.num_ranks,
            self.model,
            self.ranks_fit,
            self.counter.tokens_of_steps(),
            epoch.seconds / epoch.steps,
        )

    def _memory_parts(self, profile: PassProfile) -> MemoryParts:
        """Divide the memory of a step into weights, adapters, activations and head.

        The parts add up to the memory estimated for the chosen settings. The part of the head is
        taken from `profile`, that of the longest pass.
        """
        trained = memory.trainable_bytes(self.model)
        weights = self._held_bytes() - trained
        adapters = memory.TRAINING_COPIES * trained + self.optimizer_bytes
        rest = max(0, self.fitted.bytes - weights - adapters)
        head = min(rest, max(0, int(profile.fixed.bytes)))
        return MemoryParts(weights, adapters, rest - head, head)

    def _capacity(self, long: ProfilePoint, short: ProfilePoint) -> Capacity:
        """Estimate how many of the longest pairs fit into memory, and how long one pair can be.

        Both numbers are extrapolated from the profiles of a long and a short pass.
        """
        curve = fit_memory_curve(long, short)
        free = self.budget.bytes - self._held_bytes() - self.optimizer_bytes
        # Tokens of the prompt and the longer completion, as a share of all tokens of the pair.
        row_share = len(self.longest[0]) / long.tokens
        context = context_length(self.base.config) or MAX_TOKENS
        tokens = largest_that_fits(lambda n: curve.bytes(1, n / row_share) <= free, limit=context)
        pairs = largest_that_fits(lambda n: curve.bytes(n, long.tokens) <= free, limit=MAX_PAIRS)
        return Capacity(pairs, tokens, tokens == context)


def _row_lengths(pairs: Pairs) -> RowLengths:
    """Return median, 90th percentile and maximum of the pairs' lengths, in tokens.

    The length of a pair is that of its prompt and its longer completion.
    """
    rows = row_lengths(pairs)
    median, most = np.percentile(rows, [50, 90], method="higher")
    return RowLengths(int(median), int(most), int(rows.max()))
