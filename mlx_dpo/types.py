"""The nouns of the package, in the order in which a preference meets them.

Shape letters used everywhere: B pairs in a batch, N = 2B rows (all chosen, then all
rejected), T tokens in a padded row, V vocabulary. Log-probabilities are in nats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx

Message = dict[str, Any]  # at least `role` and `content`, as chat templates read them
Text = str | tuple[Message, ...]  # plain text, or the turns of a conversation


@dataclass(frozen=True, slots=True)
class Preference:
    """One judgement, still as text: `chosen` was preferred to `rejected` after `prompt`."""

    prompt: Text
    chosen: Text
    rejected: Text
    where: str  # `file:line`, for messages
    given: Mapping[str, Any] = field(default_factory=dict)  # what else templates read: `tools`…
    whole: bool = False  # cut from whole texts, so that its prompt is not one user turn
    lead: float | None = None  # by how much chosen is rated higher, where it was ranked by that


@dataclass(frozen=True, slots=True)
class Judgement:
    """One answer that was found good or bad by itself, still as text."""

    prompt: Text
    completion: Text
    desirable: bool
    where: str
    given: Mapping[str, Any] = field(default_factory=dict)
    whole: bool = False


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """The same judgement as token ids. The parts stay apart: masks are derived, never stored."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    where: str = ""
    # Digest of the prompt before anything was cut or merged, to tell like prompts by.
    asked: str = field(default="", compare=False)
    margin: float = 0.0  # how much better chosen is, where the data says so
    weight: float = 1.0  # how much the pair counts, where the data says so
    # A single judged completion is `chosen`; `rejected` is then another prompt's completion,
    # by which KTO estimates how far the policy has moved.
    desirable: bool | None = None  # the judgement; None for pairs

    def __len__(self) -> int:
        """Tokens of the longer of the two rows."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


class PairBatch(NamedTuple):
    """What one forward pass sees. Rows: every chosen completion, then every rejected one."""

    tokens: mx.array  # (N, T) int32, padded on the right
    completion_mask: mx.array  # (N, T) bool, True where tokens[n, t] is to be scored


class PairLogps(NamedTuple):
    """Summed completion log-probabilities under one model, one entry per pair."""

    chosen: mx.array  # (B,) float32
    rejected: mx.array  # (B,) float32

    def at(self, places: Sequence[int]) -> "PairLogps":
        """Those of the pairs at these places. (b,) each"""
        rows = mx.array(list(places), dtype=mx.int32)
        return PairLogps(self.chosen[rows], self.rejected[rows])


class PairFacts(NamedTuple):
    """What a loss may want to know of pairs beside their log-probabilities."""

    chosen_tokens: mx.array  # (B,) float32, tokens of the completion
    rejected_tokens: mx.array  # (B,) float32
    mean_chosen_tokens: mx.array  # () float32, over all pairs that the loss is a mean of
    margins: mx.array  # (B,) float32
    weights: mx.array  # (B,) float32
    desirable: mx.array  # (B,) bool, all True for pairs


class Scored(NamedTuple):
    """Pairs as policy and reference see them: what an objective is a function of."""

    policy: PairLogps
    reference: PairLogps  # zeros where the objective needs none
    facts: PairFacts
    on_policy: mx.array  # (B,) float32, WPO's weight of each pair; ones without


class PairOutcomes(NamedTuple):
    """What the objective says of each pair; means over any set of pairs start from here."""

    losses: mx.array  # (B,) float32
    scored: Scored
    chosen_rewards: mx.array  # (B,) beta times the log-ratio of the chosen completion
    rejected_rewards: mx.array  # (B,)


class PreferenceMetrics(NamedTuple):
    """Means over a set of pairs, as floats; `objective.metrics` owns their public names."""

    loss: float
    chosen_rewards: float | None  # None: a step of labelled rows may have none of one kind
    rejected_rewards: float | None
    margins: float | None
    accuracies: float
    chosen_logps: float | None
    rejected_logps: float | None
    chosen_tokens: float | None = None  # that are scored
    rejected_tokens: float | None = None
    kl: float | None = None  # nats, of labelled rows: KTO's estimate
    # Between how much longer chosen is than rejected and the margin; None if one does not vary.
    length_correlation: float | None = None


class StepMetrics(NamedTuple):
    """One optimizer update, as the loop yields it."""

    step: int  # 1 for the first update
    epoch: float  # passes over the training pairs when the update was done
    preferences: PreferenceMetrics
    grad_norm: float  # global norm before clipping
    learning_rate: float
    num_tokens: int  # tokens without padding that the update put through the model
    padding_share: float  # of the tokens that went through the model's layers
