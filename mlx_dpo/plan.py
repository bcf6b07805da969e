"""Estimate the memory, tokens, FLOPs and time of a training run without running it."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from functools import cached_property, partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.config.training import PassLimit
from mlx_dpo.data.batches.micro_batches import (
    COUNTED_PAIRS,
    count_micro_batches,
    first_steps,
    largest_micro_batch,
    micro_batches,
)
from mlx_dpo.data.batches.token_counts import padded_row_tokens, shares_prefixes
from mlx_dpo.data.columns import (
    LENGTHS,
    column,
    lengths_only,
    longest_pairs,
    prompt_keys,
    row_lengths,
)
from mlx_dpo.data.dataset import select_pairs
from mlx_dpo.errors import ModelError
from mlx_dpo.generation.context import context_length
from mlx_dpo.models.empty_weights import load_empty_model
from mlx_dpo.models.load import LoadedModel
from mlx_dpo.phases import phase
from mlx_dpo.profiling import memory
from mlx_dpo.profiling.device_memory import MemoryBudget, available_memory, mac_memory
from mlx_dpo.profiling.extrapolate import (
    ProfilePoint,
    extrapolate_seconds,
    fit_memory_curve,
    largest_that_fits,
)
from mlx_dpo.profiling.flops import (
    ModelFlops,
    TokenCounts,
    count_attended_keys,
    count_trie_tokens,
    model_flops,
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
from mlx_dpo.runs.reference import count_steps, needed_pairs
from mlx_dpo.scoring.kernels.gated_delta import use_fused_gated_delta
from mlx_dpo.scoring.select_scorer import ScorerChoice
from mlx_dpo.training.reference_logps import BLOCK_SIZE
from mlx_dpo.types import TokenizedPair

SHORT_SHARE = 0.5  # length of the second profiled pass, as a share of the longest pair
MAX_PAIRS = 1024
MAX_TOKENS = 2**20  # if the model has no context length

Pairs = Sequence[TokenizedPair]

# The fields of the following four classes are keys of `mlx-dpo plan --json`.


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
class EpochEstimate:
    """Steps, tokens, FLOPs and time of one epoch; pairs, FLOPs and time of the reference log-probs.

    The reference is scored on the training pairs that the steps of the run see, and on all held-out
    pairs.
    """

    steps: int
    passes: int
    tokens: int  # through the layers
    prompts: int
    tokens_pair_by_pair: int  # with one pair per pass, which runs its prompt once
    whole_rows: int  # tokens of the same pairs as whole padded rows
    rows: int  # tokens through the head
    operations: int
    seconds: float
    reference_pairs: int
    reference_operations: int
    reference_seconds: float


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
            "learning_rate": self.fitted.config.learning_rate,
        }


def estimate_run(
    config: DPOConfig,
    *,
    memory_size: str | None = None,
) -> RunEstimate:
    """Estimate memory, work and time of a run with these settings.

    Args:
        memory_size: memory of a Mac to plan for, such as `16GB`; None plans for this machine.

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
            estimate = _RunEstimator(inputs, config, choice, budget).estimate()
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
        self, inputs: Inputs, config: DPOConfig, choice: ScorerChoice, budget: MemoryBudget
    ) -> None:
        self.inputs, self.choice, self.budget = inputs, choice, budget
        self.base, self.model = inputs.base, inputs.base.model
        self.fitted = fit_micro_batch_size(
            self.base, config, choice, inputs.train, room=budget, measure=True
        )
        self.config = self.fitted.config
        self.optimizer_bytes = optimizer_state_bytes(self.model, config)
        self.longest = longest_micro_batch(self.config, choice, inputs.train)
        self.short = shorten_pairs(self.longest[:1], SHORT_SHARE)

    def estimate(self) -> RunEstimate:
        """Measure the passes and return the estimate of the run."""
        points = {recompute: self._profile(recompute=recompute) for recompute in (False, True)}
        long, short = points[bool(self.config.recompute)]
        reference, reference_pairs = self._profile_reference()
        return RunEstimate(
            inputs=self.inputs,
            choice=self.choice,
            fitted=self.fitted,
            lengths=_row_lengths(self.inputs.train),
            parameters=memory.base_parameters(self.model),
            parts=self._memory_parts(long.profile),
            reference_bytes=memory.parameter_bytes(self.model) + reference.bytes,
            without_recomputation=self._capacity(*points[False]),
            with_recomputation=self._capacity(*points[True]),
            epoch=self._epoch(long, short, reference, reference_pairs),
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
        return ProfilePoint(profile, len(pairs), self._layer_tokens([pairs]) / len(pairs))

    def _profile_reference(self) -> tuple[PassProfile, Pairs]:
        """Return memory and time of the largest reference forward pass, and its pairs."""
        longest = self._longest_reference_pairs
        limit = inference_limit(self.config, self.choice, longest)
        pairs = largest_micro_batch(longest, limit, cost=self.choice.cost)
        profile = profile_inference_pass(
            self.model, pairs, self._compute_reference_logps, memory=available_memory().bytes
        )
        return profile, pairs

    @cached_property
    def _longest_reference_pairs(self) -> Pairs:
        """The longest pairs of all splits on which the reference is scored, the longest last."""
        splits, needed = self.inputs.splits, needed_pairs(self.config, self.inputs.splits)
        return longest_pairs(
            MAX_PAIRS, *(select_pairs(splits[split], needed[split]) for split in splits)
        )

    def _compute_reference_logps(self, pairs: Pairs) -> object:
        """Return the log-probs of `pairs` under the reference."""
        with reference_mode(self.model, self.config):
            return make_dataset_scorer(self.config, self.choice)(self.model, pairs)

    def _memory_parts(self, profile: PassProfile) -> MemoryParts:
        """Divide the memory of a step into weights, adapters, activations and head.

        The parts add up to the memory estimated for the chosen settings. The part of the head is
        taken from `profile`, that of the longest pass.
        """
        trained = memory.trainable_bytes(self.model)
        weights = memory.parameter_bytes(self.model) - trained
        adapters = memory.TRAINING_COPIES * trained + self.optimizer_bytes
        rest = max(0, self.fitted.bytes - weights - adapters)
        head = min(rest, max(0, int(profile.fixed.bytes)))
        return MemoryParts(weights, adapters, rest - head, head)

    def _capacity(self, long: ProfilePoint, short: ProfilePoint) -> Capacity:
        """Estimate how many of the longest pairs fit into memory, and how long one pair can be.

        Both numbers are extrapolated from the profiles of a long and a short pass.
        """
        curve = fit_memory_curve(long, short)
        free = self.budget.bytes - memory.resident_bytes(self.model, self.optimizer_bytes)
        # Tokens of the prompt and the longer completion, as a share of all tokens of the pair.
        row_share = len(self.longest[0]) / long.tokens
        context = context_length(self.base.config) or MAX_TOKENS
        tokens = largest_that_fits(lambda n: curve.bytes(1, n / row_share) <= free, limit=context)
        pairs = largest_that_fits(lambda n: curve.bytes(n, long.tokens) <= free, limit=MAX_PAIRS)
        return Capacity(pairs, tokens, tokens == context)

    def _epoch(
        self,
        long: ProfilePoint,
        short: ProfilePoint,
        reference: PassProfile,
        reference_pairs: Pairs,
    ) -> EpochEstimate:
        """Estimate tokens, FLOPs and time of an epoch and of computing the reference log-probs."""
        config, train = self.config, self.inputs.train
        count = partial(
            count_micro_batches,
            train,
            config.pass_limit,
            order=make_order(config, train),
        )
        counts = count(cost=self.choice.cost)
        flops = model_flops(self.model, self.base.config, vocab_size=self.base.vocab_size)
        train_flops = partial(flops.training, recompute=bool(config.recompute))
        tokens = self._training_counts(counts.tokens.total)
        # Passes without gradients over a step's pairs, before its gradients (GradCache, WPO).
        extra_flops = config.extra_forward_passes * flops.forward(tokens, adapted=True)
        reference_flops = self._reference_flops(flops)
        measured = self._token_counts(reference_pairs, self._layer_tokens([reference_pairs]))
        flops_per_second = flops.forward(measured, adapted=False) / reference.seconds
        timed = [
            (
                train_flops(self._token_counts(pairs, self._layer_tokens([pairs]))),
                point.profile.seconds,
            )
            for pairs, point in ((self.short, short), (self.longest, long))
        ]
        seconds = extrapolate_seconds(
            *timed, passes=counts.micro_batches, operations=train_flops(tokens)
        )
        return EpochEstimate(
            steps=counts.steps,
            passes=counts.micro_batches,
            tokens=tokens.layer_tokens,
            prompts=len(set(prompt_keys(train))),
            tokens_pair_by_pair=int(column(train, LENGTHS).sum()) - 2 * len(train),
            whole_rows=count(cost=padded_row_tokens).tokens.total,
            rows=tokens.head_tokens,
            operations=train_flops(tokens) + extra_flops,
            seconds=seconds + extra_flops / flops_per_second,
            reference_pairs=len(self._reference_pairs()),
            reference_operations=reference_flops,
            reference_seconds=reference_flops / flops_per_second,
        )

    def _reference_flops(self, flops: ModelFlops) -> int:
        """Return the FLOPs of computing the reference log-probs of a run.

        The result is 0 if the loss needs no reference.
        """
        pairs = self._reference_pairs()
        if not pairs:
            return 0
        if not shares_prefixes(self.choice.cost):
            tokens = self._token_counts(pairs, self._layer_tokens([pair] for pair in pairs))
            return flops.forward(tokens, adapted=False)
        splits, needed = self.inputs.splits, needed_pairs(self.config, self.inputs.splits)
        chosen = [select_pairs(splits[name], needed[name]) for name in splits if len(needed[name])]
        limit = inference_limit(self.config, self.choice, self._longest_reference_pairs)
        work = 0
        for some in chosen:
            blocks = [
                range(len(some))[at : at + BLOCK_SIZE] for at in range(0, len(some), BLOCK_SIZE)
            ]
            work += flops.forward(self._trie_counts(some, blocks, limit), adapted=False)
        return work

    def _training_counts(self, layer_tokens: int) -> TokenCounts:
        """Count the tokens and the attended keys of an epoch, of which the layers' are known."""
        train = self.inputs.train
        if not shares_prefixes(self.choice.cost):
            return self._token_counts(lengths_only(train), layer_tokens)
        steps = make_order(self.config, train).epoch_steps(0)
        found = self._trie_counts(train, steps, self.config.pass_limit)
        return replace(found, layer_tokens=layer_tokens)

    def _trie_counts(
        self, pairs: Pairs, steps: Sequence[Sequence[int]], limit: PassLimit
    ) -> TokenCounts:
        """Count passes that run shared prefixes once, scaled from the first steps to all pairs."""
        counted = first_steps(steps, COUNTED_PAIRS)
        cost = self.choice.cost
        found = count_trie_tokens(
            [pairs[i] for i in batch]
            for step in counted
            for batch in micro_batches(step, pairs, limit, cost=cost)
        )
        scale = len(pairs) / sum(map(len, counted))
        return TokenCounts(*(round(scale * number) for number in astuple(found)))

    def _reference_pairs(self) -> Pairs:
        """Return the lengths of the pairs on which the reference is scored."""
        if not self.config.needs_reference:
            return []
        splits, needed = self.inputs.splits, needed_pairs(self.config, self.inputs.splits)
        lengths = {split: lengths_only(pairs) for split, pairs in splits.items()}
        return [lengths[split][index] for split in splits for index in needed[split]]

    def _layer_tokens(self, passes: Iterable[Pairs]) -> int:
        """Return the number of tokens through the layers, summed over all `passes`."""
        return sum(self.choice.cost(pairs).total for pairs in passes)

    def _token_counts(self, pairs: Pairs, layer_tokens: int) -> TokenCounts:
        """Count the tokens and the attended keys of passes over `pairs`."""
        shared = self.choice.name != "plain"
        completions = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
        head_tokens = completions if shared else layer_tokens
        return TokenCounts(layer_tokens, head_tokens, count_attended_keys(pairs, shared=shared))


def _row_lengths(pairs: Pairs) -> RowLengths:
    """Return median, 90th percentile and maximum of the pairs' lengths, in tokens.

    The length of a pair is that of its prompt and its longer completion.
    """
    rows = row_lengths(pairs)
    median, most = np.percentile(rows, [50, 90], method="higher")
    return RowLengths(int(median), int(most), int(rows.max()))
