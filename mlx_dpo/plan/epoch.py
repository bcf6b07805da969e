"""Tokens, FLOPs and time of an epoch and of the reference log-probs."""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property, partial

from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.config.training import PassLimit
from mlx_dpo.data.batches.micro_batches import (
    COUNTED_PAIRS,
    count_micro_batches,
    first_steps,
    micro_batches,
)
from mlx_dpo.data.batches.token_counts import padded_row_tokens, shares_prefixes
from mlx_dpo.data.columns import LENGTHS, column, lengths_only, longest_pairs, prompt_keys
from mlx_dpo.data.dataset import select_pairs
from mlx_dpo.profiling.extrapolate import extrapolate_seconds
from mlx_dpo.profiling.flops import (
    ModelFlops,
    TokenCounts,
    count_attended_keys,
    count_trie_tokens,
    model_flops,
)
from mlx_dpo.runs.build import inference_limit, make_order
from mlx_dpo.runs.inputs import Inputs
from mlx_dpo.runs.reference import needed_pairs
from mlx_dpo.scoring.select_scorer import ScorerChoice
from mlx_dpo.training.reference_logps import BLOCK_SIZE
from mlx_dpo.types import TokenizedPair

MAX_PAIRS = 1024

Pairs = Sequence[TokenizedPair]


@dataclass(frozen=True)
class EpochEstimate:
    """Steps, tokens, FLOPs and time of one epoch; pairs, FLOPs and time of the reference log-probs.

    The reference is scored on the training pairs that the steps of the run see, and on all held-out
    pairs. The fields are keys of `mlx-dpo plan --json`.
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
class TimedPairs:
    """The pairs of a measured pass, and its time in seconds."""

    pairs: Pairs
    seconds: float


class EpochCounter:
    """Counts the tokens and FLOPs of an epoch and of the reference log-probs of a run."""

    def __init__(self, inputs: Inputs, config: DPOConfig, choice: ScorerChoice) -> None:
        self.inputs, self.config, self.choice = inputs, config, choice

    def estimate(self, short: TimedPairs, long: TimedPairs, reference: TimedPairs) -> EpochEstimate:
        """Estimate tokens, FLOPs and time of an epoch and of computing the reference log-probs.

        Args:
            short: a pass with gradients over short pairs.
            long: a pass with gradients over long pairs.
            reference: a pass of the reference, without gradients.
        """
        config, train, base = self.config, self.inputs.train, self.inputs.base
        count = partial(
            count_micro_batches,
            train,
            config.pass_limit,
            order=make_order(config, train),
        )
        counts = count(cost=self.choice.cost)
        flops = model_flops(base.model, base.config, vocab_size=base.vocab_size)
        train_flops = partial(flops.training, recompute=bool(config.recompute))
        tokens = self._training_counts(counts.tokens.total)
        # Passes without gradients over a step's pairs, before its gradients (GradCache, WPO).
        extra_flops = config.extra_forward_passes * flops.forward(tokens, adapted=True)
        reference_flops = self._reference_flops(flops)
        measured = self._token_counts(reference.pairs, self.layer_tokens([reference.pairs]))
        flops_per_second = flops.forward(measured, adapted=False) / reference.seconds
        timed = [
            (
                train_flops(self._token_counts(timed.pairs, self.layer_tokens([timed.pairs]))),
                timed.seconds,
            )
            for timed in (short, long)
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

    def tokens_of_steps(self) -> list[list[int]]:
        """Return the tokens of each pass, in the order of the passes, for the first steps."""
        train, cost = self.inputs.train, self.choice.cost
        pairs = train if shares_prefixes(cost) else lengths_only(train)
        steps = first_steps(make_order(self.config, train).epoch_steps(0), COUNTED_PAIRS)
        return [
            [
                cost([pairs[i] for i in batch]).total
                for batch in micro_batches(step, pairs, self.config.pass_limit, cost=cost)
            ]
            for step in steps
        ]

    @cached_property
    def longest_reference_pairs(self) -> Pairs:
        """The longest pairs of all splits on which the reference is scored, the longest last."""
        splits, needed = self.inputs.splits, needed_pairs(self.config, self.inputs.splits)
        return longest_pairs(
            MAX_PAIRS, *(select_pairs(splits[split], needed[split]) for split in splits)
        )

    def layer_tokens(self, passes: Iterable[Pairs]) -> int:
        """Return the number of tokens through the layers, summed over all `passes`."""
        return sum(self.choice.cost(pairs).total for pairs in passes)

    def _reference_flops(self, flops: ModelFlops) -> int:
        """Return the FLOPs of computing the reference log-probs of a run.

        The result is 0 if the loss needs no reference.
        """
        pairs = self._reference_pairs()
        if not pairs:
            return 0
        if not shares_prefixes(self.choice.cost):
            tokens = self._token_counts(pairs, self.layer_tokens([pair] for pair in pairs))
            return flops.forward(tokens, adapted=False)
        splits, needed = self.inputs.splits, needed_pairs(self.config, self.inputs.splits)
        chosen = [select_pairs(splits[name], needed[name]) for name in splits if len(needed[name])]
        limit = inference_limit(self.config, self.choice, self.longest_reference_pairs)
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

    def _token_counts(self, pairs: Pairs, layer_tokens: int) -> TokenCounts:
        """Count the tokens and the attended keys of passes over `pairs`."""
        shared = self.choice.name != "plain"
        completions = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
        head_tokens = completions if shared else layer_tokens
        return TokenCounts(layer_tokens, head_tokens, count_attended_keys(pairs, shared=shared))
