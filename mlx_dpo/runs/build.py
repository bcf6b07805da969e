"""Create adapters, optimizer, scorers and the training plan of a run from its settings."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlx_dpo.adapters import attach as adapters
from mlx_dpo.adapters.adapter_files import (
    attach_loaded_adapter,
    read_adapter,
    with_adapter_weights,
)
from mlx_dpo.adapters.layers import adapter_rank
from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.config.training import SCORED_BY_PAIRS, PassLimit
from mlx_dpo.data.batches.micro_batches import largest_micro_batch
from mlx_dpo.data.batches.order import PairOrder, group_numbers
from mlx_dpo.data.columns import LENGTHS, column, longest_pairs, prompt_keys
from mlx_dpo.errors import ConfigError
from mlx_dpo.generation.context import context_length
from mlx_dpo.io.notices import notify_once
from mlx_dpo.models.device import device_kind, is_cpu
from mlx_dpo.models.load import LoadedModel
from mlx_dpo.optim import optimizers
from mlx_dpo.optim.default_learning_rate import (
    RateFactors,
    choose_learning_rate,
    choose_supervised_rate,
)
from mlx_dpo.optim.lr_schedule import learning_rate
from mlx_dpo.phases import phase
from mlx_dpo.profiling.flops import model_width
from mlx_dpo.profiling.memory import trainable_bytes
from mlx_dpo.reporting.samples import SamplesLog
from mlx_dpo.runs.folder import RunPaths
from mlx_dpo.runs.inputs import Inputs
from mlx_dpo.scoring.score_pairs import DatasetScorer, Processes, on_policy_weights, score_pairs
from mlx_dpo.scoring.scorers import Packing, Scorer, memory_efficient_training
from mlx_dpo.scoring.select_scorer import (
    ScorerChoice,
    ScorerSetting,
    default_packings,
    select_scorer,
)
from mlx_dpo.scoring.sharded.gathered_blocks import is_sharded
from mlx_dpo.training.monitor.recorded_samples import RecordedSampler
from mlx_dpo.training.monitor.samples import AnswerSampler, BaseMode
from mlx_dpo.training.objective import Objective
from mlx_dpo.training.plan import TrainingPlan
from mlx_dpo.training.synced_reference import SyncedReference
from mlx_dpo.types import PairLogps, TokenizedPair

Pairs = Sequence[TokenizedPair]
OnPolicyWeights = Callable[[nn.Module, Sequence[TokenizedPair]], mx.array]  # weights of pairs, (B,)

# A pass without gradients may be so many times as large, because it saves no activations.
INFERENCE_FACTOR = 4
# Tokens of a pass without gradients. On the CPU, larger arrays do not fit into its caches. On a
# GPU, which was not measured, little is gained beyond a few thousand tokens.
INFERENCE_TOKENS = {"cpu": 512, "metal": 4096, "cuda": 4096}


def attach_adapters(base: LoadedModel, config: DPOConfig) -> dict[str, Any]:
    """Attach adapters to `base`, or make its weights trainable, as the settings say.

    Returns:
        The content of `adapter_config.json`, which mlx-lm reads.

    Raises:
        ConfigError: a setting does not fit the model or the adapter to start from.
        ModelError: the adapter to start from is damaged or belongs to another model, or layers
            cannot be trained.
    """
    mx.random.seed(config.seed % 2**64)  # also for dropout, if no adapters are initialized
    if config.start_adapter is not None:
        saved = read_adapter(Path(config.start_adapter))
        if saved.fine_tune_type == "full":
            _check_not_quantized(base, config)
            if config.lora_dropout is not None:
                raise ConfigError("`lora_dropout` has no effect: `start_adapter` has no adapters")
        attach_loaded_adapter(base.model, saved, dropout=config.dropout)
    elif config.fine_tune_type == "full":
        _check_not_quantized(base, config)
        targets, num_layers = config.lora_target_modules, config.num_layers
        adapters.enable_full_fine_tuning(base.model, target_modules=targets, num_layers=num_layers)
    else:
        adapters.attach_adapters(
            base.model,
            kind="dora" if config.fine_tune_type == "dora" else "lora",
            rank=config.rank,
            scale=config.lora_scale,
            dropout=config.dropout,
            target_modules=config.lora_target_modules,
            num_layers=config.num_layers,
            seed=config.seed,
        )
    return adapters.make_adapter_config(base.model)


def _check_not_quantized(base: LoadedModel, config: DPOConfig) -> None:
    """Raise `ConfigError` if the base model is quantized: full fine-tuning cannot train it.

    On the CPU, mlx-dpo unpacks quantized weights and could train them, but the trained weights
    would not fit the quantized model.
    """
    if base.config.get("quantization") or base.config.get("quantization_config"):
        instead = "the unquantized model" if config.bits is None else "the model without --bits"
        raise ConfigError(
            "fine_tune_type `full`: the model is quantized, and quantized weights cannot be "
            f"trained; use {instead}, or fine_tune_type `lora` or `dora`"
        )


def reference_mode(policy: nn.Module, config: DPOConfig) -> AbstractContextManager[None]:
    """Return a context in which the untrained policy serves as the reference.

    New adapters do not change the output of the model, so they are disabled to save time.
    """
    fresh = config.start_adapter is None and adapters.get_fine_tune_type(policy) != "full"
    return adapters.disable_adapters(policy) if fresh else nullcontext()


METHODS = {"lora": "LoRA", "dora": "DoRA", "full": "full fine-tuning"}


def with_learning_rate(
    inputs: Inputs, config: DPOConfig, total_steps: int
) -> tuple[DPOConfig, str]:
    """Return the settings with a learning rate, and what it was chosen by.

    A learning rate that the settings have stays, and the text is "". The adapters must be attached
    to the base model already.
    """
    if config.learning_rate is not None:
        return config, ""
    base, method = inputs.base, adapters.get_fine_tune_type(inputs.base.model)
    layers = list(adapters.adapted_layers(base.model).values())
    alpha = None if method == "full" else float(layers[0].scale) * adapter_rank(layers[0])
    tokens = float(column(inputs.train, LENGTHS)[:, 1].mean())
    run = RateFactors(model_width(base.config), alpha, total_steps, tokens)
    factor = optimizers.OPTIMIZERS[config.optim].rate_factor
    if config.supervised:
        reason = f"{METHODS[method]}, instruction tuning, width {run.width or 'unknown'}"
        rate = choose_supervised_rate(run, factor=factor)
        return replace(config, learning_rate=rate), reason
    reasons = [
        METHODS[method],
        f"width {run.width or 'unknown'}",
        f"{total_steps} step{'s' * (total_steps != 1)}",
        f"{tokens:.0f} tokens per completion",
    ]
    return replace(config, learning_rate=choose_learning_rate(run, factor=factor)), ", ".join(
        reasons
    )


def with_grouping(config: DPOConfig, pairs: Sequence[TokenizedPair]) -> tuple[DPOConfig, str]:
    """Return the settings with the order of the pairs chosen, and what it was chosen by.

    Pairs of one prompt are kept together where that saves work and changes only the order: a pass
    computes the tokens once that its texts begin with, and the loss is a mean over pairs. The text
    is "" if the setting was given, or stays open, which is the order of pairs shuffled one by one.
    """
    is_shared = config.scorer not in ("plain", "shared")
    if config.group_by_prompt is not None or config.uses_whole_batch or not is_shared:
        return config, ""
    if int(group_numbers(pairs).max(initial=-1)) + 1 == len(pairs):
        return config, ""
    reason = f"{len(pairs):,} {config.unit} of {len(set(prompt_keys(pairs))):,} prompts"
    return replace(config, group_by_prompt=True), reason


def make_order(config: DPOConfig, pairs: Sequence[TokenizedPair]) -> PairOrder:
    """Return the order in which the steps of a run see its training pairs."""
    return PairOrder.of(
        pairs,
        batch_size=config.batch_size,
        seed=config.seed,
        group_by_prompt=bool(config.group_by_prompt),
        whole_prompts=config.listwise,
    )


def make_optimizer(policy: nn.Module, config: DPOConfig) -> optim.Optimizer:
    """Create the optimizer that the settings name, initialized for the trainable parameters."""
    given = {name: getattr(config, name) for name in optimizers.OPTIMIZERS[config.optim].settings}
    settings = {name: value for name, value in given.items() if value is not None}
    return optimizers.build_optimizer(config.optim, policy, config.peak_learning_rate, **settings)


def optimizer_state_bytes(policy: nn.Module, config: DPOConfig) -> int:
    """Return the size in bytes of the optimizer state and of the synced reference's weights.

    The size is computed from shapes; no array is allocated. It does not depend on the rate.
    """
    synced = trainable_bytes(policy) if config.sync_ref_model else 0
    optimizer = make_optimizer(policy, replace(config, learning_rate=1.0))
    return optimizers.count_state_bytes(optimizer) + synced


def choose_scorer(
    base: LoadedModel, config: DPOConfig, earlier: Mapping[str, Any] | None = None
) -> ScorerChoice:
    """Choose the function that computes the log-probs of pairs in the run.

    The adapters must be attached already. A resumed run keeps the scorer that it began with.

    Args:
        earlier: run record (content of `run.json`) of a run that is resumed.

    Raises:
        ModelError: the settings name a scorer that is not exact for this model, or no scorer agrees
            with the model's generation.
    """
    wanted = cast(ScorerSetting, config.scorer)
    packings: tuple[Packing, ...] = ()
    if wanted == "auto" and (recorded := (earlier or {}).get("automatic_settings")) is not None:
        name = recorded.get("scorer", "shared")  # as before there was a trie scorer
        packings = default_packings("auto" if name == "trie" else "shared")
        wanted = "plain" if name == "plain" else "auto"
    with (
        phase("Checking the scorer"),
        memory_efficient_training(base.model, recompute=bool(config.recompute)),
    ):  # as in training
        return select_scorer(
            base.model,
            vocab_size=base.vocab_size,
            requested=wanted,
            packings=packings,
            ld_alpha=config.ld_alpha,
            max_length=config.length_limit,
        )


def with_recorded_scorer(
    config: DPOConfig, choice: ScorerChoice, earlier: Mapping[str, Any] | None
) -> DPOConfig:
    """Return the settings, with the scorer by name if the run began before there was a trie scorer.

    Its passes without gradients then have the numbers of pairs that they had.
    """
    recorded = (earlier or {}).get("automatic_settings")
    is_older = recorded is not None and "scorer" not in recorded
    return replace(config, scorer=choice.name) if is_older else config


def inference_limit(config: DPOConfig, choice: ScorerChoice, pairs: Pairs) -> PassLimit:
    """Return the maximum number of pairs or tokens in a forward pass without gradients.

    Short texts share a pass up to `INFERENCE_TOKENS`. Longer texts share one as far as memory is
    known to suffice, because a training pass with as many tokens needs more. With the setting
    `scorer: shared` or `plain`, the limit is the number of pairs that earlier versions had, because
    log-probs differ in their last bits with the pairs that share a pass. `micro_batch_tokens`
    limits these passes as well.

    Args:
        pairs: the pairs that will be scored.
    """
    # Logits of whole sequences leave no memory for more, and a training pass with recomputation
    # saves no more activations than this one.
    factor = 1 if choice.name == "plain" or config.recompute else INFERENCE_FACTOR
    by_pairs = choice.name == "plain" or config.scorer in SCORED_BY_PAIRS
    if by_pairs or config.micro_batch_tokens is not None:
        return config.pass_limit.scaled(1 if is_cpu() else factor)
    few, many = INFERENCE_TOKENS["cpu"], INFERENCE_TOKENS[device_kind()]
    if few == many:
        return PassLimit(tokens=few)
    longest = longest_pairs(config.batch_size, pairs)
    largest = choice.cost(largest_micro_batch(longest, config.pass_limit, cost=choice.cost)).total
    return PassLimit(tokens=min(many, max(few, factor * largest)))


def make_dataset_scorer(
    config: DPOConfig, choice: ScorerChoice, scorer: Scorer | None = None
) -> DatasetScorer:
    """Return a function that computes log-probs of a dataset without gradients.

    The function is used for reference log-probs and for evaluations.

    Args:
        scorer: another function of `choice` that takes pairs; None: the one of log-probs.
    """

    def score(
        model: nn.Module,
        pairs: Pairs,
        *,
        progress: Callable[[int], None] = lambda scored: None,
    ) -> PairLogps:
        return score_pairs(
            model,
            pairs,
            limit=inference_limit(config, choice, pairs),
            scorer=scorer or choice.forward_only,
            cost=choice.cost,
            processes=Processes(choice.passes_at_once, choice.ranks),
            progress=progress,
        )

    return score


def make_answer_sampler(
    config: DPOConfig, inputs: Inputs, paths: RunPaths, step: int
) -> RecordedSampler | None:
    """Create the sampler of answers to held-out prompts; None if there are none to sample.

    A sharded model is not sampled.

    Args:
        paths: the files of the run; its samples file records the answers.
        step: number of optimizer steps that were taken before a resume.

    Raises:
        DamagedFileError: the samples file is damaged.
    """
    base = inputs.base
    if is_sharded(base.model):
        if config.sample_count and inputs.valid:
            notify_once(
                "answers are not sampled: with `shard_base` each token would gather all weights"
            )
        return None
    sampler = AnswerSampler.for_pairs(
        inputs.valid,
        config.sample_count,
        stop_tokens=base.tokenizer.eos_token_ids,
        context=context_length(base.config),
    )
    if sampler is None:
        return None
    sampler.base_mode = _start_mode(config)
    log = SamplesLog(paths.samples, after=step)
    recorded = RecordedSampler(sampler, base.tokenizer, log, thinking=config.thinking)
    if step == 0 and adapters.get_fine_tune_type(base.model) == "full":
        base.model.eval()
        recorded.remember_untrained(base.model)
    return recorded


def _start_mode(config: DPOConfig) -> BaseMode:
    """Return the context in which a policy is the model that training started from.

    That is the base with the start adapter, if there is one: without it, instruction tuning before
    the preferences would count as drift of the preferences.
    """
    if config.start_adapter is None:
        return adapters.disable_adapters
    return partial(with_adapter_weights, adapter=read_adapter(Path(config.start_adapter)))


def make_on_policy_weights(config: DPOConfig, choice: ScorerChoice) -> OnPolicyWeights | None:
    """Return a function that computes WPO weights of pairs; None if `use_weighting` is not set."""
    if not config.use_weighting:
        return None
    score = make_dataset_scorer(config, choice, choice.log_weights)
    return partial(on_policy_weights, score=score)


def make_synced_reference(
    policy: nn.Module, config: DPOConfig, choice: ScorerChoice
) -> SyncedReference | None:
    """Return a reference that follows the policy; None if `sync_ref_model` is not set."""
    if not config.sync_ref_model:
        return None
    score = make_dataset_scorer(config, choice)
    return SyncedReference(policy, alpha=config.mixup_alpha, every=config.sync_steps, score=score)


def check_step_settings(config: DPOConfig, total_steps: int) -> None:
    """Raise `ConfigError` if settings do not fit the number of steps of the run.

    The warm-up must end, and a synced reference must be updated, before the last step.
    """
    if config.sync_ref_model and config.sync_steps >= total_steps:
        raise ConfigError(
            f"`sync_ref_model` has no effect: the reference is updated every {config.sync_steps} "
            f"steps and the run has {total_steps} steps; use a smaller --ref-model-sync-steps"
        )
    if config.warmup_steps is not None and config.warmup_steps >= total_steps:
        raise ConfigError(
            f"`warmup_steps` {config.warmup_steps} leaves none of the run's {total_steps} steps "
            "for the learning rate it rises to; use fewer"
        )


def make_plan(
    config: DPOConfig,
    pairs: Sequence[TokenizedPair],
    reference: PairLogps,
    *,
    choice: ScorerChoice,
    total_steps: int,
    synced_reference: SyncedReference | None = None,
) -> TrainingPlan:
    """Create the training plan: pairs, objective and hyper-parameters of every step.

    Args:
        reference: log-probs of `pairs` under the reference, (len(pairs),) each.
    """
    return TrainingPlan(
        pairs=pairs,
        reference=reference,
        objective=Objective(config),
        learning_rate=partial(
            learning_rate,
            peak=config.peak_learning_rate,
            total=total_steps,
            warmup=config.count_warmup_steps(total_steps),
            schedule=config.lr_scheduler_type,
            min_lr_rate=config.final_lr_share,
        ),
        total_steps=total_steps,
        batch_size=config.batch_size,
        limit=config.pass_limit,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        scorer=choice.scorer,
        cost=choice.cost,
        score=make_dataset_scorer(config, choice),
        on_policy_weights=make_on_policy_weights(config, choice),
        synced_reference=synced_reference,
        recompute=bool(config.recompute),
        group_by_prompt=bool(config.group_by_prompt),
        whole_prompts=config.listwise,
        passes_at_once=choice.passes_at_once,
        ranks=choice.ranks,
    )
