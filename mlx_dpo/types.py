"""Types that the whole package shares, in the order of the data flow.

Shape letters used everywhere: B pairs in a batch, N = 2B sequences (all chosen, then all
rejected), T tokens in a padded sequence, V vocabulary. Log-probabilities are in nats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import mlx.core as mx

Message = dict[str, Any]  # at least `role` and `content`, as chat templates read them
MetricsRow = Mapping[str, float]  # a line of metrics.jsonl: `step` and metrics by name
Text = str | tuple[Message, ...]  # plain text, or the turns of a conversation


class RankedPair(NamedTuple):
    """The place of a pair in the ranked list (a row with rated completions) that it is from."""

    list_id: int  # digest of the row's prompt, completions and scores; below 2^48
    chosen: int  # position of the completion in the row, from 0
    rejected: int
    chosen_score: float  # higher is better; a rank n is the score -n
    rejected_score: float
    score_range: float  # best score of the list minus worst
    num_pairs: int  # pairs made of the list, before any is left out; 0: the pair is of no list


NO_LIST = RankedPair(0, 0, 1, 1.0, 0.0, 1.0, 0)  # of a plain pair, which is a list of two


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """A preference pair as text: annotators preferred `chosen` to `rejected` after `prompt`."""

    prompt: Text
    chosen: Text
    rejected: Text
    location: str  # `file:line`, for messages
    # Further fields that chat templates read, such as `tools`.
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    # The dataset has whole texts (TRL's "implicit prompt"): the prompt was cut from them and is
    # not one user turn.
    implicit_prompt: bool = False
    score_gap: float | None = None  # score of chosen minus that of rejected, for ranked lists
    ranking: RankedPair = NO_LIST


@dataclass(frozen=True, slots=True)
class UnpairedExample:
    """A completion as text, labelled desirable or undesirable (TRL's "unpaired preference").

    An example of instruction tuning is desirable. Its completion may be several turns of a
    conversation, of which those of the assistant are scored.
    """

    prompt: Text
    completion: Text
    desirable: bool
    location: str
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    implicit_prompt: bool = False


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """A preference pair as token ids. `chosen` and `rejected` do not include the prompt.

    Masks are derived from the lengths and from `gaps`, and never stored.
    """

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    location: str = ""
    # Digest of the prompt before truncation and token merging; equal prompts have equal digests.
    prompt_digest: str = field(default="", compare=False)
    margin: float = 0.0  # how much better chosen is, if the data has a margin column
    weight: float = 1.0  # weight in the loss, if the data has a weight column
    # The completion of an unpaired example is `chosen`; `rejected` is then the completion of
    # another prompt, from which KTO estimates the KL divergence, and empty in instruction tuning.
    desirable: bool | None = None  # the label of an unpaired example; None for pairs
    ranking: RankedPair = NO_LIST
    # Ranges of `chosen` that are not scored: what others say between two turns of the assistant.
    gaps: tuple[tuple[int, int], ...] = ()

    @property
    def scored(self) -> list[int]:
        """Positions in `chosen` of the tokens that are scored."""
        ends = [0, *(end for _, end in self.gaps)]
        starts = [*(start for start, _ in self.gaps), len(self.chosen)]
        return [i for part in zip(ends, starts, strict=True) for i in range(*part)]

    @property
    def num_scored(self) -> int:
        """Number of tokens of `chosen` that are scored."""
        return len(self.chosen) - sum(end - start for start, end in self.gaps)

    def __len__(self) -> int:
        """Return the number of tokens of the prompt with the longer completion."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))

    def cut_completions(self, chosen: int, rejected: int) -> "TokenizedPair":
        """Return the pair with at most so many tokens of each completion.

        If the cut is in a gap, `chosen` ends before it: tokens after the last scored one have no
        effect.
        """
        gaps = tuple((start, min(end, chosen)) for start, end in self.gaps if start < chosen)
        if gaps and gaps[-1][1] == chosen:
            *gaps_before, (chosen, _) = gaps
            gaps = tuple(gaps_before)
        return replace(
            self, chosen=self.chosen[:chosen], rejected=self.rejected[:rejected], gaps=gaps
        )


def scored_completions(pairs: Sequence[TokenizedPair]) -> list[tuple[int, ...]]:
    """Return the scored token ids of all chosen, then of all rejected completions."""
    chosen = [
        tuple(pair.chosen[i] for i in pair.scored) if pair.gaps else pair.chosen for pair in pairs
    ]
    return chosen if lack_rejected(pairs) else chosen + [pair.rejected for pair in pairs]


def lack_rejected(pairs: Sequence[TokenizedPair]) -> bool:
    """Return whether the pairs have no rejected completions, as in instruction tuning."""
    return not any(pair.rejected for pair in pairs)


class PairBatch(NamedTuple):
    """Input of one forward pass: the chosen completions with their prompts, then the rejected."""

    tokens: mx.array  # (N, T) int32, padded on the right
    completion_mask: mx.array  # (N, T) bool, True where tokens[n, t] is to be scored


class PairLogps(NamedTuple):
    """Summed log-probabilities of completions under one model, one entry per pair.

    Examples of instruction tuning have no rejected completion. The second number is then that of
    the tokens of `chosen` that the model ranks first.
    """

    chosen: mx.array  # (B,) float32
    rejected: mx.array  # (B,) float32

    def take(self, indices: Sequence[int]) -> "PairLogps":
        """Return the log-probabilities of the pairs at `indices`. (b,) each"""
        rows = mx.array(list(indices), dtype=mx.int32)
        return PairLogps(self.chosen[rows], self.rejected[rows])


class PairMetadata(NamedTuple):
    """Inputs of the losses besides log-probs: token counts, margins, weights, labels, lists."""

    chosen_tokens: mx.array  # (B,) float32, scored tokens of the completion
    rejected_tokens: mx.array  # (B,) float32
    mean_chosen_tokens: mx.array  # () float32, over all pairs of the optimizer step
    margins: mx.array  # (B,) float32
    weights: mx.array  # (B,) float32
    desirable: mx.array  # (B,) bool, all True for pairs
    lists: mx.array  # (B,) int32, index of the pair's ranked list; a plain pair is a list of two
    places: mx.array  # (B, 2) int32, positions of chosen and rejected in their list, from 0
    scores: mx.array  # (B, 2) float32, of chosen and rejected in the data; 1 and 0 for plain pairs
    best_worst: mx.array  # (B,) bool, pairs of best and worst of a list of more than one pair


class ScoredPairs(NamedTuple):
    """Pairs with log-probabilities under policy and reference: the input of the objective."""

    policy: PairLogps
    reference: PairLogps  # zeros if the objective is reference-free
    metadata: PairMetadata
    on_policy_weights: mx.array  # (B,) float32, WPO's weights; ones if WPO is off


class LossOutputs(NamedTuple):
    """Loss and implied rewards of each pair, from which all metrics are computed."""

    losses: mx.array  # (B,) float32
    scored: ScoredPairs
    chosen_rewards: mx.array  # (B,) beta times the log-ratio of the chosen completion
    rejected_rewards: mx.array  # (B,)


class PreferenceMetrics(NamedTuple):
    """Metrics as means over a set of pairs; `losses.metrics` lists their names in metrics.jsonl."""

    loss: float
    chosen_rewards: float | None = None  # None if a step has no desirable example, and for SFT
    rejected_rewards: float | None = None
    margins: float | None = None
    accuracies: float | None = None  # None for SFT
    chosen_logps: float | None = None
    rejected_logps: float | None = None
    chosen_tokens: float | None = None  # scored tokens
    rejected_tokens: float | None = None
    mean_token_accuracy: float | None = None  # share of scored tokens ranked first, for SFT
    kl: float | None = None  # KTO's estimate of the KL divergence, in nats
    # Pearson correlation of the length difference (chosen minus rejected) and the margin; None
    # if one of them is constant.
    length_correlation: float | None = None
    margins_stderr: float | None = None  # standard error of the mean margin; None for one pair
    best_worst_margins: float | None = None  # of best and worst completion of ranked lists


class StepMetrics(NamedTuple):
    """Metrics of one optimizer step."""

    step: int  # 1 for the first step
    epoch: float  # passes over the training pairs after the step
    preferences: PreferenceMetrics
    grad_norm: float  # global norm before clipping
    learning_rate: float
    num_tokens: int  # tokens of the step's forward passes, without padding
    padding_share: float  # share of padding in the tokens that went through the model's layers
