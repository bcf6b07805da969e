"""Implicit rewards of a run: what its policy and its reference say of an answer, as a reward.

A model trained with DPO is a reward model: β (log π(y | x) − log π_ref(y | x)) is the reward of the
answer y, up to a term that depends on the prompt x alone. Rewards of one prompt can be compared,
rewards of different prompts cannot.

Source: Rafailov et al. 2023, arXiv:2305.18290, Eq. 5.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dpo.adapters.adapter_files import adapter_digest
from mlx_dpo.adapters.switch import AdapterSwitch
from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.data.batches.metadata import pair_metadata
from mlx_dpo.data.chat_templates.template_date import set_day
from mlx_dpo.data.tokenization.formatting import TokenRules
from mlx_dpo.data.tokenization.tokenize import tokenize_unpaired
from mlx_dpo.errors import ConfigError, RunError
from mlx_dpo.losses.log_ratios import log_ratios
from mlx_dpo.models.files import model_fingerprint
from mlx_dpo.models.load import LoadedModel
from mlx_dpo.runs.build import choose_scorer, make_dataset_scorer, with_recorded_scorer
from mlx_dpo.runs.folder import check_provenance
from mlx_dpo.runs.inputs import token_rules
from mlx_dpo.runs.reference import check_same_tokens, load_reference_model
from mlx_dpo.saved_runs.open import (
    OpenRun,
    SwitchableModel,
    load_adapter_into,
    load_base_of_run,
    load_reference_into,
    load_synced_reference_into,
    open_run,
    unfinished_note,
)
from mlx_dpo.scoring.kernels.gated_delta import use_fused_gated_delta
from mlx_dpo.scoring.score_pairs import DatasetScorer
from mlx_dpo.training.objective import Objective
from mlx_dpo.types import Message, PairLogps, ScoredPairs, TokenizedPair, UnpairedExample

FORMULAS = {  # by kind of reward; beta is the run's
    "log-ratio": "beta times log π / π_ref",
    "log-probability": "beta times log π, without a reference",
    "average log-probability": "beta times the mean log π per token, without a reference",
}


@dataclass(frozen=True)
class ImplicitRewards:
    """The policy and the reference of a run, which give the implicit rewards of completions.

    The base model is loaded once; its adapters are switched between policy and reference.
    """

    run: OpenRun
    base: LoadedModel
    config: DPOConfig  # the run's, with the scorer that it began with
    switch: AdapterSwitch
    score_policy: DatasetScorer
    score_reference: Callable[[Sequence[TokenizedPair]], PairLogps]
    notes: tuple[str, ...]  # of loading, for the user

    @property
    def rules(self) -> TokenRules:
        """The run's settings of the tokenization, but texts are as long as the context or refused.

        Training may truncate. A reward of half an answer would say nothing about the whole one.
        """
        rules = token_rules(self.config, self.base)
        longest = max(rules.max_length, rules.context or 0)
        return replace(rules, max_length=longest, truncation="drop")

    @property
    def formula(self) -> str:
        """What the rewards are, as text, such as `beta times log π / π_ref, beta = 0.1`."""
        return f"{FORMULAS[self.config.reward_kind]}, beta = {self.config.common_beta:g}"

    def provenance(self) -> dict[str, Any]:
        """Return what the rewards depend on: digests of model and adapter, and the formula."""
        provenance = self.run.record["provenance"]
        return {
            "reward_model": self.base.source,
            "reward_model_digest": provenance["model"],
            "reward_adapter_digest": adapter_digest(self.run.adapter),
            "reward_formula": self.formula,
        }

    def of_pairs(self, pairs: Sequence[TokenizedPair]) -> PairLogps:
        """Return the rewards of the chosen and of the rejected completions. (len(pairs),) each

        Raises:
            TrainingError: a log-probability is not a finite number.
        """
        with use_fused_gated_delta(self.base.model):
            reference = self.score_reference(pairs)
            with self.switch.activated("aligned"):
                policy = self.score_policy(self.base.model, pairs)
        scored = ScoredPairs(policy, reference, pair_metadata(pairs), mx.ones((len(pairs),)))
        return Objective(self.config).compute_rewards(scored, log_ratios(policy, reference))

    def of_completions(self, examples: Sequence[TokenizedPair]) -> list[float]:
        """Return the rewards of the `chosen` completions alone. (len(examples),)"""
        pairs, places = _as_pairs(examples, by_two=self.config.ld_alpha is None)
        if not pairs:
            return []
        rewards = self.of_pairs(pairs)
        values = np.array(rewards.chosen), np.array(rewards.rejected)
        return [float(values[side][number]) for number, side in places]

    def tokenize(self, prompt: Sequence[Message], answer: str, location: str) -> TokenizedPair:
        """Tokenize an answer to a conversation as training did, into `chosen`.

        Raises:
            BadPairError: the answer is empty, or too long for the model's context.
            DataError: the conversation does not fit the chat template.
        """
        set_day(self.base.tokenizer, self.run.day)
        reply: tuple[Message, ...] = ({"role": "assistant", "content": answer},)
        example = UnpairedExample(tuple(prompt), reply, True, location)
        return tokenize_unpaired(self.base.tokenizer, example, self.rules).pair


def _as_pairs(
    examples: Sequence[TokenizedPair], *, by_two: bool
) -> tuple[list[TokenizedPair], list[tuple[int, int]]]:
    """Return pairs with all completions, and the pair and the side (0, 1) of each completion.

    The scorers take pairs. Two neighbours with the same prompt share one; any other completion is
    both sides of its pair. With LD-DPO (`by_two` False) a log-probability would depend on the
    other side.
    """
    pairs: list[TokenizedPair] = []
    places: list[tuple[int, int]] = []
    is_open = False  # whether the last pair has room for another completion
    for example in examples:
        if is_open and by_two and pairs[-1].prompt == example.prompt:
            pairs[-1] = replace(pairs[-1], rejected=example.chosen)
            places.append((len(pairs) - 1, 1))
            is_open = False
        else:
            pairs.append(replace(example, rejected=example.chosen, desirable=None))
            places.append((len(pairs) - 1, 0))
            is_open = True
    return pairs, places


def open_implicit_rewards(folder: str, loaded: SwitchableModel | None = None) -> ImplicitRewards:
    """Load policy and reference of a run, or use those of the same run that are loaded already.

    Raises:
        ConfigError: the loss of the run implies no reward.
        RunError, ModelError: the run, its model or its reference cannot be read.
    """
    run = open_run(folder) if loaded is None or loaded.run is None else loaded.run
    config = run.config
    if not any(loss.reward for loss in config.losses):
        raise ConfigError(
            f"{folder}: loss_type {', '.join(config.loss_type)} implies no reward; use a run that "
            "was trained on preferences"
        )
    if loaded is None or config.sync_ref_model:
        base = load_base_of_run(run)
        switch, notes = _load_both(run, base), base.notes
        notes = notes if run.finished else (*notes, unfinished_note(run))
    else:
        base, switch, notes = loaded.base, loaded.switch, ()
    with use_fused_gated_delta(base.model), switch.activated("aligned"):
        choice = choose_scorer(base, config, run.record)
    config = with_recorded_scorer(config, choice, run.record)
    score = make_dataset_scorer(config, choice)
    reference = _reference_scorer(run, base, switch, score)
    return ImplicitRewards(run, base, config, switch, score, reference, tuple(notes))


def _load_both(run: OpenRun, base: LoadedModel) -> AdapterSwitch:
    """Load reference and policy into `base`; return the switch between the two."""
    switch = AdapterSwitch(base.model)
    if not load_synced_reference_into(run, base):
        load_reference_into(run, base)
    switch.save_state("base")
    load_adapter_into(run, base)
    switch.save_state("aligned")
    return switch


def _reference_scorer(
    run: OpenRun, base: LoadedModel, switch: AdapterSwitch, score: DatasetScorer
) -> Callable[[Sequence[TokenizedPair]], PairLogps]:
    """Return a function that computes the log-probs of pairs under the reference of the run.

    Without a reference the function returns zeros.

    Raises:
        RunError: the separate reference model is not the one of the run.
    """
    if not run.config.needs_reference:
        return lambda pairs: PairLogps(mx.zeros((len(pairs),)), mx.zeros((len(pairs),)))
    if run.config.reference_model is None:

        def score_base(pairs: Sequence[TokenizedPair]) -> PairLogps:
            with switch.activated("base"):
                return score(base.model, pairs)

        return score_base
    other = load_reference_model(run.config)
    now = {"reference_model": model_fingerprint(other.path)}
    check_provenance(run.paths, run.record, now)
    score_other = make_dataset_scorer(run.config, choose_scorer(other, run.config))

    def score_reference_model(pairs: Sequence[TokenizedPair]) -> PairLogps:
        check_same_tokens(other, base.tokenizer, pairs)
        return score_other(other.model, pairs)

    return score_reference_model


def check_chat_run(run: OpenRun) -> None:
    """Raise `RunError` if the run was trained on plain text, so that it cannot rate chat answers.

    Its policy has never seen the chat template.
    """
    if run.trained_on_text:
        raise RunError(
            f"{run.paths.folder}: trained on plain text, but the answers are those of a "
            "conversation; use a run that was trained on messages"
        )
